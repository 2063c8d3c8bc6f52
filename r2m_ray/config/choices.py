"""The values a configuration field may take: enumerations, and numbers that know their range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

PREPARED = "prepared"
"""Value of ``model.policy`` and ``model.reward`` that means: what `r2m-ray prepare` made for this config."""


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from ``low`` to ``high``; an end does not belong to the range where it is open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'>' if self.low_open else '≥'} {self.low:g}"
        return (
            f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"
        )


Count = Annotated[int, Range(1)]
"""A number of things, at least one."""
Natural = Annotated[int, Range(0)]
"""A number of things, possibly none."""
Positive = Annotated[float, Range(0, low_open=True)]
"""A quantity above zero."""
NonNegative = Annotated[float, Range(0)]
"""A quantity, possibly zero."""
Fraction = Annotated[float, Range(0, 1)]
"""A share or weight from 0 to 1."""


class TaskName(StrEnum):
    """What the policy is trained on."""

    note2answer = "note2answer"
    preferences = "preferences"


GOLD_TASKS = (TaskName.note2answer,)
"""Tasks whose gold score is known."""


class Dtype(StrEnum):
    """Floating-point type of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Advantage(StrEnum):
    """How rewards of a group become advantages: the keys of ``core.advantages.ADVANTAGES``."""

    rloo = "rloo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    reinforce_pp = "reinforce_pp"
    remax = "remax"


class Ratio(StrEnum):
    """What the importance ratio ρ of Eq. 2 is taken over: the whole response, each token, or their mean."""

    sequence = "sequence"
    token = "token"
    geometric = "geometric"


class OldLogprobs(StrEnum):
    """Who scores π_old: the learner before its first step, or the engine that sampled."""

    learner = "learner"
    rollout = "rollout"


class KLEstimator(StrEnum):
    """Monte-Carlo estimator of KL(π_θ‖π_ref) per token."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(StrEnum):
    """Whether the KL penalty is a term of the loss or is subtracted from the reward."""

    loss = "loss"
    reward = "reward"


class OmegaSchedule(StrEnum):
    """ω(t) of Eq. 4: the cosine down to its floor, or the floor throughout."""

    cosine = "cosine"
    constant = "constant"


class WoInit(StrEnum):
    """Start of W_o: Gaussian like the other three matrices, or zero, which makes Ĥ start at 0."""

    random = "random"
    zero = "zero"


class PairSource(StrEnum):
    """Who picks winner and loser of Eq. 5: rewards of the annotation, of the update, of the frozen RM, or the
    gold score; ``random`` draws two rows, seeded by run, step and shard."""

    annotation = "annotation"
    recomputed = "recomputed"
    frozen_rm = "frozen_rm"
    gold = "gold"
    random = "random"


class RewardScale(StrEnum):
    """Scale of the rewards that become advantages: the keys of ``core.shaping.SCALES``."""

    raw = "raw"
    match_frozen = "match_frozen"


class RewardShape(StrEnum):
    """What becomes of scaled rewards before advantages: the keys of ``core.shaping.SHAPES``."""

    raw = "raw"
    par = "par"


class FeedbackSource(StrEnum):
    """Who exports the policy's hidden states for the annotation."""

    rollout = "rollout"
    learner = "learner"


class FeedbackRefresh(StrEnum):
    """Which hidden states the reward update reads: the last epoch's, an extra pass's, or the annotation's."""

    last_epoch = "last_epoch"
    exact = "exact"
    none = "none"


class SyncBackend(StrEnum):
    """How weights travel from the learner to the rollout engines."""

    object_store = "object_store"
    nccl = "nccl"
    ipc = "ipc"


class Overlong(StrEnum):
    """What happens to a row of the data over the length limits."""

    error = "error"
    drop = "drop"


class OnAlarm(StrEnum):
    """What an alarm does beside being told and logged: nothing, or end the run after its step is saved."""

    warn = "warn"
    stop = "stop"


class WandbMode(StrEnum):
    """Where Weights & Biases writes, if anywhere."""

    offline = "offline"
    online = "online"
    disabled = "disabled"
