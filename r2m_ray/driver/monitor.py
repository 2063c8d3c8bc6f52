"""Alarms for whoever watches a run: its reward leaves the frozen one, or its policy leaves the reference.

All of it is a function of the rows of training steps as ``metrics.jsonl`` keeps them. So a resumed run has
the alarms of an uninterrupted one, and other bounds can be tried on a run that is over (``replay``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from r2m_ray.config.schema import MonitorConfig, OnAlarm
from r2m_ray.errors import Alarmed

Row = Mapping[str, Any]
"""A training step's metrics by their names; one that is absent, None or not finite is unknown."""

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
"""What each alarm says of its level, and what helps; named as the bounds in ``monitor``."""


GAP_KEYS = ("reward/mean", "reward/frozen_mean", "reward/frozen_group_std", "omega")
"""What a step's gap is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the monitor makes of a run after one of its steps.

    levels: what is compared with each bound, None until enough steps are known. alarms: those on now, in the
    order of ``ALARMS``. new: those of them that were never on before.
    """

    step: int
    levels: Mapping[str, float | None]
    alarms: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """``alarm/<name>``, 1 where it is on and else 0."""
        return {f"alarm/{name}": float(name in self.alarms) for name in ALARMS}


class Monitor:
    """Follows a run step by step.

    rows: of the steps that are over, in their order.
    """

    def __init__(self, config: MonitorConfig, rows: Iterable[Row] = ()) -> None:
        self._config = config
        self._bounds = {
            "scale_ratio": config.scale_ratio,
            "frozen_gap": config.frozen_gap,
            "flip_rate": config.flip_rate,
            "kl": config.kl,
        }
        self._scale_ratio: list[float] = []
        self._flip_rate: list[float] = []
        self._kl: list[float] = []
        self._gap: list[float] = []
        self._frozen_spread: list[float] = []
        self._raised: set[str] = set()
        self._last = Reading(step=0, levels=dict.fromkeys(ALARMS))
        for row in rows:
            self.observe(int(row["step"]), row)

    def observe(self, step: int, row: Row) -> Reading:
        """Take note of a step; returns the levels and alarms after it."""
        self._note(row)
        levels = self._levels()
        alarms = tuple(
            name for name, level in levels.items() if level is not None and level > self._bounds[name]
        )
        new = tuple(name for name in alarms if name not in self._raised)
        self._raised.update(new)
        self._last = Reading(step=step, levels=levels, alarms=alarms, new=new)
        return self._last

    @property
    def ends_run(self) -> bool:
        """Whether an alarm is on that the run must end for (``monitor.on_alarm=stop``)."""
        return self._config.on_alarm is OnAlarm.stop and bool(self._last.alarms)

    def news(self) -> list[str]:
        """What to tell of the last step: one text for each alarm that was never on before."""
        return [self._told(name) for name in self._last.new]

    def error(self) -> Alarmed:
        """What ends a run after the last step."""
        told = "\n".join(self._told(name) for name in self._last.alarms)
        return Alarmed(
            f"{told}\nThe run ended here, and its last step is saved (monitor.on_alarm=stop). To go on as it "
            "is, use run.resume=true with monitor.on_alarm=warn or a higher bound; to learn otherwise, begin "
            "under another run.name."
        )

    def _note(self, row: Row) -> None:
        for values, key in (
            (self._scale_ratio, "reward/scale_ratio"),
            (self._flip_rate, "reward/pair_flip_rate"),
            (self._kl, "policy/kl_sequence"),
        ):
            if _known(row, key):
                values.append(row[key])
        if all(_known(row, key) for key in GAP_KEYS):
            # ω(t) shrinks what the own reward has of the frozen one, which is no change of either model.
            self._gap.append(row["reward/mean"] - row["omega"] * row["reward/frozen_mean"])
            self._frozen_spread.append(row["reward/frozen_group_std"])

    def _levels(self) -> dict[str, float | None]:
        return {
            "scale_ratio": self._latest(self._scale_ratio),
            "frozen_gap": self._risen_gap(),
            "flip_rate": self._latest(self._flip_rate),
            "kl": self._latest(self._kl),
        }

    def _latest(self, values: list[float]) -> float | None:
        steps = self._config.steps
        return median(values[-steps:]) if len(values) >= steps else None

    def _risen_gap(self) -> float | None:
        """Rise of the gap since the first steps, in units of *their* spread: later, a policy that writes one
        response only has none."""
        gap, first = self._latest(self._gap), self._config.steps
        if gap is None:
            return None
        spread = median(self._frozen_spread[:first])
        return (gap - median(self._gap[:first])) / spread if spread > 0 else None

    def _told(self, name: str) -> str:
        what, remedy = ALARMS[name]
        level = what.format(level=self._last.levels[name])
        return (
            f"alarm {name} at step {self._last.step}: {level} (median of {self._config.steps} steps; "
            f"monitor.{name}={self._bounds[name]:g}). {remedy}"
        )


def replay(config: MonitorConfig, rows: Iterable[Row]) -> list[Reading]:
    """What a monitor with these bounds would have said after each training step of a run.

    rows: of ``metrics.jsonl`` (``r2m_ray.run.files.read_steps``); evaluations among them are passed over.
    """
    monitor = Monitor(config)
    return [monitor.observe(int(row["step"]), row) for row in rows if row.get("kind") != "eval"]


def _known(row: Row, key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)
