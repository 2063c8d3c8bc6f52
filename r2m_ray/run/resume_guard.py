"""Whether a run may go on from what its directory holds: told before Ray starts, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from r2m_ray.config.schema import Config
from r2m_ray.errors import Problem
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, driver_state
from r2m_ray.run.files import CONFIG_FILE, METRICS_FILE, read_steps
from r2m_ray.run.resume import differences, run_identity


def resume_problems(config: Config) -> Iterator[Problem]:
    """Why the run in its directory is not the one that ``config`` describes, or cannot go on.

    Raises RunError where the run has checkpoints and none is valid, InputError for a damaged metrics file.
    """
    directory = Path(config.run.root) / config.run.name
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=config.checkpoint.keep)
    newest = checkpoints.newest()
    if newest is None:
        yield from _without_commit(directory)
        return
    stored = driver_state(newest).identity
    if not stored:
        message = f"{newest} does not say what its run was made of, so nothing is compared"
        yield Problem("run.resume", message, warning=True)
        return
    yield from differences(stored, run_identity(config), reshard=config.run.reshard)


def _without_commit(directory: Path) -> Iterator[Problem]:
    """A run that surely committed once must not begin again unseen; one that may not have, says so."""
    file = directory / METRICS_FILE
    rows = read_steps(file) if file.is_file() else []
    last = max((int(row["step"]) for row in rows if row.get("kind") == "step"), default=0)
    every = _every(directory / CONFIG_FILE)
    checkpoints = directory / CHECKPOINTS
    traces = [*checkpoints.glob(".damaged-*")]
    # A step's row is written just before its commit, so the row at `every` alone proves nothing.
    if traces or 0 < every < last:
        proof = f"{METRICS_FILE} reaches step {last}" if 0 < every < last else f"{traces[0]} is there"
        message = (
            f"true, but {checkpoints} holds no checkpoint although {proof}; restore them from a backup, or "
            "start again under another run.name"
        )
        yield Problem("run.resume", message)
    elif last:
        message = f"{directory} has no checkpoint yet; its {last} steps are computed again from the start"
        yield Problem("run.resume", message, warning=True)


def _every(file: Path) -> int:
    """``checkpoint.every`` of the run's last start; 0 where its configuration cannot be read."""
    try:
        return int(OmegaConf.load(file).checkpoint.every)
    except (OSError, ValueError, TypeError, AttributeError, OmegaConfBaseException, YAMLError):
        return 0
