"""The four roles of R2M as the driver knows them.

A step's batch is cut into shards: fixed sets of complete groups. A shard is the unit of work and of
recovery for every role, and no role ever splits or merges one, so advantages, Bradley–Terry pairs
and group reward entropy stay local to it.

Each call returns what the driver reads, a few numbers per row, and references (``Ref``) to records that are
as wide as a model or as long as a text. The driver passes references on and cannot read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from r2m_ray.core.batch import (
    Annotation,
    Hidden,
    ReferenceKL,
    ReferenceLogprobs,
    RowText,
    SampledRows,
    SamplePlan,
    Scores,
    Trajectories,
)

Record = TypeVar("Record")
Stats = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ref(Generic[Record]):
    """A reference to a record that stays where it was made. handle: what the roles know it by."""

    handle: Any


Shards = Sequence[Ref[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPairs:
    """Shards of preference pairs as groups of two rows, the one that people preferred first; maybe none."""

    hidden: Shards[Hidden]
    annotation: Shards[Annotation]


class Rollout(Protocol):
    """Samples trajectories with the current weights and exports the policy's hidden states."""

    async def sample(
        self, plans: Sequence[SamplePlan]
    ) -> tuple[Sequence[SampledRows], Shards[Trajectories], Shards[Hidden]]:
        """One shard per plan."""
        ...

    async def texts(self, trajectories: Ref[Trajectories], rows: int) -> Sequence[RowText]:
        """The first ``rows`` rows of one shard in words, or all where it has fewer."""
        ...


class Policy(Protocol):
    """The trainable policy π_θ."""

    async def update(
        self,
        trajectories: Shards[Trajectories],
        advantage: Sequence[Tensor],
        reference: Shards[ReferenceLogprobs],
        hidden: Shards[Hidden],
    ) -> tuple[Stats, Shards[Hidden]]:
        """Take k epochs of the clipped objective (Eq. 2) and return the refreshed h of every shard."""
        ...

    async def hidden(self, trajectories: Shards[Trajectories]) -> Shards[Hidden]:
        """h of every row under the current weights, without an update."""
        ...

    async def save(self, directory: Path) -> None: ...

    async def load(self, directory: Path) -> None: ...


class Reference(Protocol):
    """The frozen reference policy π_ref."""

    async def logprobs(
        self, trajectories: Shards[Trajectories]
    ) -> tuple[Sequence[ReferenceKL], Shards[ReferenceLogprobs]]: ...


class Reward(Protocol):
    """The frozen reward model with the trainable R2M head."""

    async def annotate(
        self, trajectories: Shards[Trajectories], hidden: Shards[Hidden], *, omega: float, step: int
    ) -> tuple[Sequence[Scores], Shards[Annotation]]:
        """r = φ(H_fin) of every row (Eqs. 3–4), beside the frozen reward model's own score."""
        ...

    async def warm_up(self, human: LabelledPairs, *, omega: float) -> Stats:
        """Take one step of Bradley–Terry on people's pairs alone, before the first update."""
        ...

    async def update(
        self,
        hidden: Shards[Hidden],
        annotation: Shards[Annotation],
        human: LabelledPairs,
        *,
        omega: float,
        step: int,
    ) -> Stats:
        """Fit cross-attention and φ to the annotated groups by GREBT (Eqs. 5–7); the trunk never runs.

        `human` pairs have the share ``reward.anchor_fraction`` of Bradley–Terry.
        """
        ...

    async def attention(
        self, hidden: Ref[Hidden], annotation: Ref[Annotation], rows: int
    ) -> Sequence[Sequence[float]]:
        """The head's attention weight on every token of the first ``rows`` rows of one shard."""
        ...

    async def save(self, directory: Path) -> None: ...

    async def load(self, directory: Path) -> None: ...


class WeightSync(Protocol):
    """Carries the policy's weights into the rollout engines and stamps them with a version."""

    async def __call__(self, *, version: int) -> Stats: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everything the driver drives."""

    rollout: Rollout
    policy: Policy
    reference: Reference
    reward: Reward
    sync: WeightSync
    share: Callable[[Any], Ref[Any]]
    """Makes a record that the driver built (held-out pairs, say) readable by the roles."""
