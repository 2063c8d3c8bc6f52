"""The records of a training step: packed ones travel between roles, light ones are read by the driver.

Axes: G groups (prompts), K rows per group, N = G·K rows, T = Σ(Sₙ−1) packed input tokens,
P policy width, D reward-model width. Row n of a group occupies ``offsets[n]:offsets[n+1]`` of
every ``_T`` tensor: S−1 entries, because the last sampled token is never fed back. The same
offsets therefore index inputs, labels, log-probs, masks and hidden states.

Every tensor is on the CPU, contiguous and detached. Records read from the object store share
memory with every other reader, so nothing may write into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_ray.core.packing import offsets_of, row_index


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of the task: its text, and a stable index that seeds its samples."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePlan:
    """What to sample for one shard; the same plan gives the same tokens on any replica, at any time.

    group_size rows per prompt; row j of prompt p is seeded by (seed, step, p.index, j).
    greedy_first makes row 0 of each group the greedy response (ReMax's baseline).
    temperature 0 is greedy throughout.
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    step: int
    seed: int
    temperature: float
    max_new_tokens: int
    greedy_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each row lies in the packed axis, and how rows form groups.

    offsets: int64 [N+1], non-decreasing, ``offsets[0] == 0``; row n has ``offsets[n+1]-offsets[n]`` tokens.
    group_size: K; rows iK … iK+K−1 are group i.
    """

    offsets: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.offsets.dtype != torch.int64 or self.offsets.ndim != 1 or self.offsets.numel() < 1:
            raise ValueError(
                f"offsets must be int64 [N+1], got {self.offsets.dtype} {list(self.offsets.shape)}"
            )
        if self.rows % self.group_size:
            raise ValueError(f"{self.rows} rows do not form groups of {self.group_size}")

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], group_size: int) -> Layout:
        return cls(offsets=offsets_of(lengths), group_size=group_size)

    @property
    def rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def groups(self) -> int:
        return self.rows // self.group_size

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each row."""
        return self.offsets.diff()

    @property
    def row_T(self) -> Tensor:
        """int64 [T], the row each token belongs to."""
        return row_index(self.offsets)

    def slice_of(self, row: int) -> slice:
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Sampled rows: what the policy read and wrote (Algorithm 1, Trajectory Sampling).

    input_T, label_T: int64 [T], ``ids[:-1]`` and ``ids[1:]`` of each row.
    action_T: bool [T], true where the label is a token of the response.
    rollout_logp_T: float32 [T], log-prob of the label under the sampling distribution (logits/temperature);
        0 where ``action_T`` is false.
    truncated_N: bool [N], the response hit its length limit without an end token.
    prompts, responses: the text of each group's prompt [G] and of each row's response [N].
    version: the weight version (training step) that sampled the rows.
    """

    layout: Layout
    input_T: Tensor
    label_T: Tensor
    action_T: Tensor
    rollout_logp_T: Tensor
    truncated_N: Tensor
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    version: int

    @property
    def response_lengths(self) -> Tensor:
        """int64 [N], sampled tokens of each row, the end token included."""
        return torch.bincount(self.layout.row_T[self.action_T], minlength=self.layout.rows)

    @property
    def row_prompts(self) -> tuple[str, ...]:
        """The prompt of each row [N]."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.layout.group_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Policy feedback h: hidden_TP [T, P], the policy's last-layer state at every input token.

    P is 0 where a run uses no feedback (ω is 1 throughout), so that vanilla runs the same code.
    """

    layout: Layout
    hidden_TP: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """The reward model's reading of a shard (Algorithm 1, Reward Annotation).

    reward_N: float32 [N], r = φ(H_fin), Eqs. 3–4: the model's own reward, before any shaping.
    frozen_reward_N: float32 [N], the untouched reward model's own score.
    gold_N: float32 [N], the task's gold score, NaN where the task knows none.
    rte_ND: float32 [N, D], the reward token embedding H_last; the update reuses it: the trunk is frozen.
    response_id_N: int64 [N], equal for two rows of a group exactly when they are the same tokens; a pair of
        equal rows teaches nothing and is skipped.
    """

    layout: Layout
    reward_N: Tensor
    frozen_reward_N: Tensor
    gold_N: Tensor
    rte_ND: Tensor
    response_id_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLogprobs:
    """Log-probs of the labels under π_ref, float32 [T], 0 where the label is not a response token.

    tempered_T uses logits/temperature, as sampled; unit_T uses temperature 1, for the reported KL.
    """

    tempered_T: Tensor
    unit_T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """What the driver reads of a sampled shard: numbers per row.

    length_N: int64 [N], sampled tokens of each row, the end token included.
    truncated_N, finite_N: bool [N], whether the response hit its length limit without an end token, and
        whether every log-prob it was sampled with is finite.
    tokens: input tokens of all rows, prompts included. version: of the weights that sampled them.
    """

    length_N: Tensor
    truncated_N: Tensor
    finite_N: Tensor
    tokens: int
    version: int

    @classmethod
    def of(cls, trajectories: Trajectories) -> SampledRows:
        """The numbers of one shard's trajectories."""
        layout, finite_N = trajectories.layout, torch.ones(trajectories.layout.rows, dtype=torch.bool)
        finite_N[layout.row_T[trajectories.action_T & ~torch.isfinite(trajectories.rollout_logp_T)]] = False
        return cls(
            length_N=trajectories.response_lengths,
            truncated_N=trajectories.truncated_N,
            finite_N=finite_N,
            tokens=layout.tokens,
            version=trajectories.version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the driver reads of an annotated shard: numbers per row, as in `Annotation`.

    gold: float64 [N] of the gold score (``total``) and of each part that the task makes it of; empty where
        the task knows no gold.
    """

    reward_N: Tensor
    frozen_reward_N: Tensor
    response_id_N: Tensor
    gold: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKL:
    """What the driver reads of a shard's reference log-probs: the KL of each row, summed over its response.

    Of the distribution that was sampled, both policies at ``algo.temperature``. sampled_N: by k1, whose mean
    is the KL. penalty_N: by ``algo.kl_estimator``, for a penalty that is part of the reward. float32 [N].
    """

    sampled_N: Tensor
    penalty_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowText:
    """A row as a reader sees it: its prompt, its response, and the text of each of its S−1 input tokens."""

    prompt: str
    response: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """What the policy update reads for one shard (Algorithm 1, Policy Optimization)."""

    trajectories: Trajectories
    advantage_N: Tensor
    reference: ReferenceLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """What the reward update reads for one shard (Algorithm 1, Reward Model Optimization)."""

    hidden: Hidden
    annotation: Annotation


def pack_rows(
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    responses: Sequence[str],
    *,
    logprobs: Sequence[Sequence[float]] | None = None,
    truncated: Sequence[bool] | None = None,
    version: int,
) -> Trajectories:
    """Pack N rows, whose prompts repeat ``len(response_ids) // len(prompts)`` times, into one record.

    prompts [G] and prompt_ids [G] are per group; response_ids, responses, logprobs and truncated [N] per row.
    Log-probs default to 0 (text that nobody sampled) and truncated to False.
    """
    if not prompts or len(response_ids) % len(prompts) or len(prompt_ids) != len(prompts):
        raise ValueError(f"{len(response_ids)} rows do not belong to {len(prompts)} prompts evenly")
    group_size = len(response_ids) // len(prompts)
    inputs: list[int] = []
    labels: list[int] = []
    actions: list[bool] = []
    lengths: list[int] = []
    for n, response in enumerate(response_ids):
        prompt = prompt_ids[n // group_size]
        if not prompt or not response:
            raise ValueError(
                f"row {n} has {len(prompt)} prompt and {len(response)} response tokens; both need one"
            )
        ids = [*prompt, *response]
        inputs += ids[:-1]
        labels += ids[1:]
        actions += [False] * (len(prompt) - 1) + [True] * len(response)
        lengths.append(len(ids) - 1)
    action_T = torch.tensor(actions)
    rollout_logp_T = torch.zeros(len(actions))
    if logprobs is not None:
        rollout_logp_T[action_T] = torch.tensor([logp for row in logprobs for logp in row])
    return Trajectories(
        layout=Layout.from_lengths(lengths, group_size),
        input_T=torch.tensor(inputs),
        label_T=torch.tensor(labels),
        action_T=action_T,
        rollout_logp_T=rollout_logp_T,
        truncated_N=torch.tensor(truncated if truncated is not None else [False] * len(lengths)),
        prompts=tuple(prompts),
        responses=tuple(responses),
        version=version,
    )
