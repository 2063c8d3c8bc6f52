"""Watching a run: alarms for whoever follows it, and guards that stop it.

Alarms are a function of the step rows of ``metrics.jsonl``, so a resumed run has those of an uninterrupted
one. Guards are numbers that stop a run, because going on would waste or ruin it (``guard``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from r2m_ray.config.schema import Config, MonitorConfig, OnAlarm
from r2m_ray.errors import Alarmed, RunError
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

NONFINITE = {
    metric("reward/nonfinite"): "rewards",
    metric("hidden/nonfinite"): "rows of h",
    metric("policy/nonfinite_rows"): "rows with a log-prob",
    metric("policy/skipped_steps"): "losses or gradients of the policy",
    metric("rm/nonfinite_steps"): "losses or gradients of the reward head",
}
"""Metrics that count what was not finite, and what each one counts."""
LOGPROB_GAP = metric("policy/mismatch_mean")
ROWS_NAMED = 8


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
        self._steps = config.steps
        self.bounds = {name: bound for name, bound in asdict(config).items() if name in ALARMS}
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
        alarms = tuple(n for n, level in levels.items() if level is not None and level > self.bounds[n])
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
    ends the run. ``ends_run`` asks for the step's checkpoint, and ``check`` comes after it.

    Args:
        config: its ``monitor`` and ``guard`` are used.
        rows: of the training steps so far, in their order. A run that returns to a checkpoint makes a new
            watch from the rows up to it; it starts without steps in a row that were not finite.
    """

    def __init__(self, config: Config, rows: Iterable[Row] = ()) -> None:
        self._config, self._guard = config.monitor, config.guard
        self._monitor = Monitor(config.monitor)
        self._last = Reading(step=0, levels={})
        self._nonfinite: list[str] = []
        for row in rows:
            self._last = self._monitor.observe(int(row["step"]), row)

    def versions(self, step: int, versions: Sequence[int]) -> None:
        """Raise RunError where a shard was not sampled with the weights of the step before.

        versions: of the weights that sampled each shard.
        """
        for shard, version in enumerate(versions):
            if version != step - 1:
                raise RunError(
                    f"step {step}: shard {shard} was sampled with weights of version {version}, and "
                    f"version {step - 1} was due: its rollout engine missed a weight sync. "
                    "Continue from the last checkpoint with run.resume=true."
                )

    def observe(self, step: int, metrics: Row) -> dict[str, float]:
        """Add a step; returns ``alarm/<name>`` for its row, 1 where the alarm is on and else 0."""
        self._last = self._monitor.observe(step, metrics)
        return {key: float(name in self._last.alarms) for name, key in ALARM_METRICS.items()}

    def news(self) -> list[str]:
        """One text for each alarm that the last step was the first to raise."""
        return [self._text(name) for name in self._last.new]

    def guard(self, step: int, metrics: Mapping[str, float], broken_rows: Sequence[str]) -> None:
        """Raise RunError where the step's log-prob gap, or steps in a row that were not finite, end the run.

        broken_rows: a label of each row whose reward or log-probs are not finite.
        """
        gap, limit = metrics[LOGPROB_GAP], self._guard.logprob_gap
        if gap > limit:
            raise RunError(
                f"step {step}: log-probs of rollout engine and learner are {gap:.3g} nats per token apart "
                f"for weights of version {step - 1}; guard.logprob_gap is {limit:g}. The "
                "engine holds other weights than the learner, or computes in another precision: check "
                "rollout.engine_args, sync with sync.backend=object_store and sync.verify_every=1, or raise "
                "guard.logprob_gap; then continue from the last checkpoint with run.resume=true."
            )
        found = [f"{metrics[key]:g} {what}" for key, what in NONFINITE.items() if metrics.get(key, 0) > 0]
        if not found:
            self._nonfinite.clear()
            return
        named = [*broken_rows[:ROWS_NAMED], *(["…"] if len(broken_rows) > ROWS_NAMED else [])]
        rows = "; ".join(named) or "no single row is at fault: a model is"
        self._nonfinite.append(f"step {step}: {', '.join(found)} ({rows})")
        if len(self._nonfinite) >= self._guard.nonfinite_steps:
            raise RunError(
                f"{len(self._nonfinite)} steps in a row held NaN or infinity, and their updates were skipped "
                f"(guard.nonfinite_steps={self._guard.nonfinite_steps}).\n"
                + "\n".join(self._nonfinite)
                + "\nLook at these prompts, lower policy.learning_rate or reward.learning_rate, or use "
                "model.dtype=float32; then continue from the last checkpoint with run.resume=true."
            )

    @property
    def ends_run(self) -> bool:
        """Whether an alarm is on that must end the run (``monitor.on_alarm=stop``)."""
        return self._config.on_alarm is OnAlarm.stop and bool(self._last.alarms)

    def check(self) -> None:
        """Raise Alarmed where an alarm must end the run; call it once the last step is saved."""
        if not self.ends_run:
            return
        alarms = "\n".join(self._text(name) for name in self._last.alarms)
        raise Alarmed(
            f"{alarms}\nThe run ended here, and its last step is saved (monitor.on_alarm=stop). To go on "
            "unchanged, use run.resume=true with monitor.on_alarm=warn or a higher bound. To change what it "
            "learns, start a run under another run.name."
        )

    def _text(self, name: str) -> str:
        description, remedy = ALARMS[name]
        return (
            f"alarm {name} at step {self._last.step}: {description.format(level=self._last.levels[name])} "
            f"(median of {self._config.steps} steps; monitor.{name}={self._monitor.bounds[name]:g}). {remedy}"
        )


def _known(row: Row, *names: str) -> bool:
    values = [row.get(name) for name in names]
    return all(value is not None and math.isfinite(value) for value in values)
