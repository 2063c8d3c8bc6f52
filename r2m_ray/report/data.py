"""The files of a run directory, read once for a report or a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from r2m_ray.errors import InputError
from r2m_ray.run.files import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    ROLLOUTS_FILE,
    read_metrics,
    read_steps,
)

Row = dict[str, Any]
Series = NDArray[np.float64]

_CONFIG_KEYS = {
    "run": ("name", "seed"), "task": ("name",), "algo": ("steps", "advantage"), "reward": ("omega_floor",)
}  # fmt: skip
_ENVIRONMENT_KEYS = {
    "started", "command", "python", "platform", "cpu", "cores", "memory_bytes", "accelerators", "commit",
    "packages",
}  # fmt: skip
_ROLLOUT_KEYS = {
    "group", "prompt", "response", "role", "reward", "frozen_reward", "omega", "advantage", "truncated",
    "tokens", "gold", "gold_parts", "attention",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The content of a run directory.

    steps, evaluations: rows of metrics.jsonl in order, under today's names. rollouts: rows of rollouts.jsonl.
    environment: of the run's latest start. config_text: config.yaml as it is written.
    """

    directory: Path
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[Row]
    evaluations: list[Row]
    rollouts: list[Row]

    @property
    def planned_steps(self) -> int:
        return int(self.config["algo"]["steps"])

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"])


def read_run(directory: Path) -> RunRecord:
    """Read a run directory, finished or not; InputError names the file that is missing or damaged."""
    config_text = _text(directory / CONFIG_FILE)
    rows = _metrics(directory / METRICS_FILE)
    return RunRecord(
        directory=directory,
        config_text=config_text,
        config=_config(directory / CONFIG_FILE, config_text),
        environment=_environment(directory / ENVIRONMENT_FILE),
        steps=[row for row in rows if row["kind"] == "step"],
        evaluations=[row for row in rows if row["kind"] == "eval"],
        rollouts=_rollouts(directory / ROLLOUTS_FILE),
    )


def column(rows: Sequence[Row], key: str) -> Series:
    """One metric of every row, NaN where a row lacks it or it was not finite."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def known(rows: Sequence[Row], key: str) -> bool:
    """Whether any row has a finite value of the metric."""
    return bool(np.isfinite(column(rows, key)).any())


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
        for section, names in _CONFIG_KEYS.items():
            for name in names:
                config[section][name]
    except Exception as error:  # The YAML parser's errors share no type with OmegaConf's.
        raise InputError(f"{path}: not a run's configuration ({error!r}).") from error
    return config


def _environment(path: Path) -> dict[str, Any]:
    try:
        latest: dict[str, Any] = json.loads(_text(path))["starts"][-1]
        missing = _ENVIRONMENT_KEYS - latest.keys()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: not a run's environment ({error!r}).") from error
    if missing:
        raise InputError(f"{path}: its last start lacks {sorted(missing)}.")
    return latest


def _metrics(path: Path) -> list[Row]:
    _require_file(path)
    rows = read_metrics(path)
    for row in rows:
        wrong = [k for k, v in row.items() if k != "kind" and not isinstance(v, int | float | None)]
        if wrong or row.get("kind") not in ("step", "eval"):
            raise InputError(
                f"{path}: the row of step {row['step']} is no row of metrics ({wrong or 'kind'})."
            )
    if not any(row["kind"] == "step" for row in rows):
        raise InputError(f"{path}: no training step was finished yet; nothing to report.")
    return rows


def _rollouts(path: Path) -> list[Row]:
    _require_file(path)
    rows = read_steps(path)
    for row in rows:
        if missing := _ROLLOUT_KEYS - row.keys():
            raise InputError(f"{path}: a row of step {row['step']} lacks {sorted(missing)}.")
    return rows


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing. Is {path.parent} the directory of a run?")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Is {path.parent} the directory of a run?") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}).") from error
