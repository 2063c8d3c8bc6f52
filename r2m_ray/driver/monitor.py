"""Watching a run: alarms for whoever follows it, and guards that stop it.

Alarms are a function of the step rows of ``metrics.jsonl``. So a resumed run has the alarms of an
uninterrupted one, and other bounds can be tried on a finished run (``replay``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from r2m_ray.config.schema import Config, MonitorConfig, OnAlarm
from r2m_ray.driver.guards import Guards
from r2m_ray.errors import Alarmed
from r2m_ray.run.vocabulary import metric

Row = Mapping[str, Any]
"""A training step's metrics by name. A value that is absent, None or not finite is unknown."""

ALARMS = {
    "scale_ratio": (
        "the own reward spreads {level:.3g} times as far within groups as the frozen reward model's",
        "Lower reward.learning_rate, match the scale by reward.scale=match_frozen, or take some of the pairs "
        "from humans by reward.anchor_fraction.",
    ),
    "frozen_gap": (
        "since the first steps the own reward has risen above ω times the frozen reward model's by "
        "{level:.3g} times its spread within groups",
        "Lower reward.learning_rate, raise reward.omega_floor, or hold the policy back by algo.kl_weight.",
    ),
    "flip_rate": (
        "the frozen reward model puts {level:.0%} of the pairs of the own reward in the other order",
        "Read rollouts.jsonl: unless responses got better, lower reward.learning_rate or raise "
        "reward.omega_floor.",
    ),
    "kl": (
        "the policy is {level:.3g} nats per response away from the reference",
        "Raise algo.kl_weight, or lower policy.learning_rate or algo.steps.",
    ),
}
"""What each alarm says of its level, and what helps. The names are those of the bounds in ``monitor``."""

ALARM_METRICS = {name: metric(f"alarm/{name}") for name in ALARMS}
SCALE_RATIO, FLIP_RATE = metric("reward/scale_ratio"), metric("reward/pair_flip_rate")
KL = metric("policy/kl_sequence")
OWN, FROZEN, OMEGA = metric("reward/mean"), metric("reward/frozen_mean"), metric("omega")
FROZEN_SPREAD = metric("reward/frozen_group_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The monitor's result for one step.

    levels: the value compared with each bound; None until enough steps are known. alarms: the names that are
    on now, in the order of ``ALARMS``. new: those that were never on before.
    """

    step: int
    levels: Mapping[str, float | None]
    alarms: tuple[str, ...] = ()
    new: tuple[str, ...] = ()


class Monitor:
    """Computes the alarms of a run, step by step."""

    def __init__(self, config: MonitorConfig) -> None:
        self._steps, self._bounds = config.steps, bounds(config)
        self._scale_ratio: list[float] = []
        self._flip_rate: list[float] = []
        self._kl: list[float] = []
        self._gap: list[float] = []
        self._frozen_spread: list[float] = []
        self._raised: set[str] = set()

    def observe(self, step: int, row: Row) -> Reading:
        """Add a step; returns the levels and alarms after it."""
        for values, name in ((self._scale_ratio, SCALE_RATIO), (self._flip_rate, FLIP_RATE), (self._kl, KL)):
            if _known(row, name):
                values.append(row[name])
        if _known(row, OWN, FROZEN, FROZEN_SPREAD, OMEGA):
            # ω(t) shrinks the frozen model's part of the own reward, which is no change of either model.
            self._gap.append(row[OWN] - row[OMEGA] * row[FROZEN])
            self._frozen_spread.append(row[FROZEN_SPREAD])
        levels = {
            "scale_ratio": self._latest(self._scale_ratio),
            "frozen_gap": self._gap_rise(),
            "flip_rate": self._latest(self._flip_rate),
            "kl": self._latest(self._kl),
        }
        alarms = tuple(
            name for name, level in levels.items() if level is not None and level > self._bounds[name]
        )
        new = tuple(name for name in alarms if name not in self._raised)
        self._raised.update(new)
        return Reading(step=step, levels=levels, alarms=alarms, new=new)

    def _latest(self, values: list[float]) -> float | None:
        return median(values[-self._steps :]) if len(values) >= self._steps else None

    def _gap_rise(self) -> float | None:
        """Rise of the gap since the first steps, in units of *their* spread: later spread can vanish, because
        a policy that writes one response only has none."""
        gap = self._latest(self._gap)
        spread = median(self._frozen_spread[: self._steps]) if gap is not None else 0.0
        return (gap - median(self._gap[: self._steps])) / spread if gap is not None and spread > 0 else None


class Watch:
    """Alarms and guards of one run.

    A step calls ``versions`` before it learns from the rows, ``observe`` before it logs its row (the alarms
    belong to that row), and ``news`` and ``guard`` after it, so that the log holds the row of a step that
    ends the run. ``ends_run`` and ``error`` are for after the step's checkpoint.

    Args:
        config: its ``monitor`` and ``guard`` are used.
        rows: of the training steps so far, in their order.
    """

    def __init__(self, config: Config, rows: Iterable[Row] = ()) -> None:
        self._config = config.monitor
        self._guards = Guards(config.guard)
        self.rewind(rows)

    def rewind(self, rows: Iterable[Row]) -> None:
        """Start again from the training steps in ``rows``: the run returned to a checkpoint."""
        self._guards.rewind()
        self._monitor = Monitor(self._config)
        self._last = Reading(step=0, levels={})
        for row in rows:
            self._last = self._monitor.observe(int(row["step"]), row)

    def versions(self, step: int, versions: Sequence[int]) -> None:
        """Raise RunError where a shard was not sampled with the weights of the step before.

        versions: of the weights that sampled each shard.
        """
        self._guards.versions(step, versions)

    def observe(self, step: int, metrics: Row) -> dict[str, float]:
        """Add a step; returns ``alarm/<name>`` for its row, 1 where the alarm is on and else 0."""
        self._last = self._monitor.observe(step, metrics)
        return {key: float(name in self._last.alarms) for name, key in ALARM_METRICS.items()}

    def news(self) -> list[str]:
        """One text for each alarm that the last step was the first to raise."""
        return [self._text(name) for name in self._last.new]

    def guard(self, step: int, metrics: Mapping[str, float], broken_rows: Sequence[str]) -> None:
        """Raise RunError where the step's log-prob gap, or steps in a row that were not finite, end the run.

        broken_rows: the rows whose reward or log-probs are not finite, each as ``guards.row_label`` names it.
        """
        self._guards.step(step, metrics, broken_rows)

    @property
    def ends_run(self) -> bool:
        """Whether an alarm is on that must end the run (``monitor.on_alarm=stop``)."""
        return self._config.on_alarm is OnAlarm.stop and bool(self._last.alarms)

    def error(self) -> Alarmed:
        """The error that ends a run after the last step."""
        alarms = "\n".join(self._text(name) for name in self._last.alarms)
        return Alarmed(
            f"{alarms}\nThe run ended here, and its last step is saved (monitor.on_alarm=stop). To go on "
            "unchanged, use run.resume=true with monitor.on_alarm=warn or a higher bound. To change what it "
            "learns, start a run under another run.name."
        )

    def _text(self, name: str) -> str:
        description, remedy = ALARMS[name]
        return (
            f"alarm {name} at step {self._last.step}: {description.format(level=self._last.levels[name])} "
            f"(median of {self._config.steps} steps; monitor.{name}={bounds(self._config)[name]:g}). {remedy}"
        )


def bounds(config: MonitorConfig) -> dict[str, float]:
    """The bound of each alarm."""
    return {
        "scale_ratio": config.scale_ratio,
        "frozen_gap": config.frozen_gap,
        "flip_rate": config.flip_rate,
        "kl": config.kl,
    }


def replay(config: MonitorConfig, rows: Iterable[Row]) -> list[Reading]:
    """The readings that a monitor with these bounds gives after each training step of a run.

    rows: of ``metrics.jsonl`` (``r2m_ray.run.files.read_steps``); evaluations among them are skipped.
    """
    monitor = Monitor(config)
    return [monitor.observe(int(row["step"]), row) for row in rows if row.get("kind") != "eval"]


def _known(row: Row, *names: str) -> bool:
    values = [row.get(name) for name in names]
    return all(value is not None and math.isfinite(value) for value in values)
