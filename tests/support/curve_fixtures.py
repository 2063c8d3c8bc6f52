"""Curves and run directories made of numbers that a test chooses."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.report.compare.curves import Curve, Rows
from r2m_ray.run.log import RunLog

MakeRun = Callable[..., Path]


def make_curve(
    kl: Sequence[float],
    gold: Sequence[float],
    *,
    arm: str = "vanilla",
    seed: int = 0,
    frozen: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    evaluated: Mapping[str, Sequence[float]] = MappingProxyType({}),
    trained: Mapping[str, Sequence[float]] = MappingProxyType({}),
    **settings: object,
) -> Curve:
    """A curve with these KLs and gold scores, by default evaluated every five steps.

    frozen: the proxy's scores, by default the KLs. evaluated, trained: more metrics of the evaluations, and
    metrics of the training steps. settings: of the configuration.
    """
    proxy = kl if frozen is None else frozen
    metrics = {"gold/mean": gold, "reward/frozen_mean": proxy, "reward/mean": proxy, **evaluated}
    return Curve(
        arm=arm,
        seed=seed,
        source=Path(f"runs/{arm}-{seed}"),
        settings=MappingProxyType({"run.seed": seed, **settings}),
        evaluations=rows(5 * np.arange(len(kl)) if steps is None else np.array(steps), metrics),
        training=rows(np.arange(1, 1 + max(map(len, trained.values()), default=0)), trained),
        kl=np.array(kl, dtype=np.float64),
    )


def rows(steps: np.ndarray, metrics: Mapping[str, Sequence[float]]) -> Rows:
    return Rows(steps=steps, metrics={name: np.array(v, dtype=np.float64) for name, v in metrics.items()})


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name)`` writes a run directory through the run log, and returns it.

    By name: seed, gold (one per evaluation, None without), kl, done (the last step of ten, every five are
    evaluated), change (edits the configuration), evaluated (more of each evaluation), trained (metrics of a
    training step).
    """

    def made(
        name: str,
        *,
        seed: int = 0,
        gold: Sequence[float | None] = (1.0, 2.0, 0.5),
        kl: Sequence[float] = (0.0, 3.0, 9.0),
        done: int = 10,
        change: Callable[[Config], None] = lambda config: None,
        evaluated: Mapping[str, Sequence[float]] = MappingProxyType({}),
        trained: Callable[[int], Mapping[str, float]] = lambda step: {"loss": 0.0},
    ) -> Path:
        config = Config()
        config.run.name, config.run.seed, config.algo.steps = name, seed, 10
        config.logging.wandb = WandbMode.disabled
        change(config)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        rows = [
            {"kl/sequence": k, "reward/frozen_mean": k / 2, "reward/mean": k, "gold/correct": 1.5}
            | ({} if g is None else {"gold/mean": g})
            | {key: values[i] for key, values in evaluated.items()}
            for i, (k, g) in enumerate(zip(kl, gold, strict=True))
        ]
        directory = tmp_path / name
        with RunLog(directory, config=config, resolved_yaml=text, console=Console(file=io.StringIO())) as log:
            log.evaluation(0, rows[0])
            for step in range(1, done + 1):
                log.step(step, trained(step))
                if step % 5 == 0:
                    log.evaluation(step, rows[step // 5])
        return directory

    return made
