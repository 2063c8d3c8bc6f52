"""The optimizer of the R2M head: GREBT over all replicas' groups as if they were one replica's.

Axes: N rows, G groups, K rows per group, T packed tokens, P policy width, D reward width, L losses
(Bradley–Terry, entropy, and that of human pairs where there are any), X all head parameters end to end.

The losses are sums over valid groups, and gradients are linear in them. So each replica adds up the
gradients of its groups, sums and counts are added over replicas, and only then the means of Eq. 7 are taken.
With ``reward.anchor_fraction`` people's pairs, as groups of two rows, make a third loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.optim import AdamW

from r2m_ray.config.schema import PairSource, RewardConfig
from r2m_ray.core.batch import Annotation
from r2m_ray.core.head import R2MHead
from r2m_ray.core.reward_loss import GrebtSums, HumanSums, grebt_sums, human_sums, mixed_means
from r2m_ray.engines.reward.head_files import read_json, read_tensors
from r2m_ray.engines.weights import require_finite

TENSORS_FILE = "optimizer.safetensors"
INFO_FILE = "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

GREBT_SUMS = tuple(field.name for field in fields(GrebtSums))
ROW_SUMS = ("rows", "nonfinite_rows", "feedback_ratio", "attention_entropy")
HUMAN_SUMS = tuple(field.name for field in fields(HumanSums))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardShard:
    """A shard as the head reads it: hidden_TP [T, P] on the head's device, and its annotation.

    moment: run and step, which seed pairs that are drawn at random.
    """

    hidden_TP: Tensor
    annotation: Annotation
    moment: str


class HeadTrainer:
    """AdamW (0.9, 0.999, no weight decay) on cross-attention and φ, alike on every replica.

    With world_size > 1 the default process group must exist, and every replica must call `step` as often.
    """

    def __init__(self, head: R2MHead, config: RewardConfig, *, world_size: int) -> None:
        self._head = head
        self._device = head.score_weight.device
        self._config = config
        self._anchor = config.anchor_fraction
        self._world_size = world_size
        self._parameters = dict(head.named_parameters())
        self._sizes = [parameter.numel() for parameter in self._parameters.values()]
        self._optimizer = AdamW(
            self._parameters.values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0
        )

    def step(
        self, shards: Iterable[RewardShard], omega: float, human: Iterable[RewardShard] = ()
    ) -> dict[str, float]:
        """Take one optimizer step on the mean GREBT of all replicas' groups (Eqs. 5–7).

        The shards are read one at a time; a replica may have none. `human` are shards of pairs in people's
        order, not read where ``reward.anchor_fraction`` is 0. Returns statistics from before the step, equal
        on all replicas. The step is skipped, on all replicas alike, where the gradient or a row's reward is
        not finite, and where the gradient is 0, so that momentum alone moves nothing.
        """
        gradient_LX = torch.zeros(3 if self._anchor else 2, sum(self._sizes), device=self._device)
        total = self._totals(shards, omega, gradient_LX)
        if self._anchor:
            total |= self._human_totals(human, omega, gradient_LX[2:])
        if self._world_size > 1:
            distributed.all_reduce(gradient_LX)
        norms = gradient_LX.norm(dim=1).tolist()
        gradient_X = self._mixed([*gradient_LX], total)
        norm = float(gradient_X.norm())
        statistics = self._statistics(total)
        finite = math.isfinite(norm) and not statistics["nonfinite_rows"]
        if finite and norm > 0:
            self._apply(gradient_X.mul_(min(1.0, self._config.max_grad_norm / norm)))
        statistics |= {
            "gradient_norm": norm,
            "gradient_norm_bradley_terry": norms[0] / max(total["pairs"], 1.0),
            "gradient_norm_entropy": norms[1] / max(total["groups"], 1.0),
            "skipped_steps": float(not finite or norm == 0),
            "nonfinite_steps": float(not finite),
        }
        if self._anchor:
            statistics["gradient_norm_human"] = norms[2] / max(total["human_pairs"], 1.0)
        return statistics

    @torch.no_grad()
    def measure(self, shards: Iterable[RewardShard], omega: float) -> dict[str, float]:
        """The statistics of `step` that need no gradient; changes nothing, and every replica must call."""
        return self._statistics(self._totals(shards, omega, None))

    def save(self, directory: Path) -> None:
        """Write AdamW's moments as ``optimizer.safetensors`` and its step count as ``optimizer.json``.

        Raises RunError for a moment that is not finite.
        """
        states = [(name, self._optimizer.state[p]) for name, p in self._parameters.items()]
        states = [(name, state) for name, state in states if state]
        tensors = {f"{name}.{moment}": state[moment].cpu() for name, state in states for moment in MOMENTS}
        for name, tensor in tensors.items():
            require_finite(f"moment {name} of the R2M head", tensor)
        save_file(tensors, directory / TENSORS_FILE)
        steps = int(states[0][1]["step"]) if states else 0
        (directory / INFO_FILE).write_text(json.dumps({"steps": steps}) + "\n")

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; the head's weights are restored apart."""
        steps = read_json(directory / INFO_FILE, ("steps",))["steps"]
        parameters = self._parameters if steps else {}
        shapes = {f"{name}.{moment}": p.shape for name, p in parameters.items() for moment in MOMENTS}
        tensors = read_tensors(directory / TENSORS_FILE, shapes)
        self._optimizer.state.clear()
        for name, parameter in parameters.items():
            moments = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}

    def _totals(
        self, shards: Iterable[RewardShard], omega: float, gradient_LX: Tensor | None
    ) -> dict[str, float]:
        """GREBT_SUMS and ROW_SUMS over all replicas; adds each loss's gradient to its row of gradient_LX."""
        values: list[Tensor] = []
        for shard in shards:
            reward_N = self._reward(shard, omega)
            sums = self._grebt_sums(shard, reward_N)
            if gradient_LX is not None:
                self._add_gradients((sums.bradley_terry, sums.entropy), gradient_LX[:2])
            values.append(self._numbers([*attrgetter(*GREBT_SUMS)(sums), *self._row_sums(shard, reward_N)]))
        return self._over_replicas(GREBT_SUMS + ROW_SUMS, values)

    def _human_totals(
        self, shards: Iterable[RewardShard], omega: float, gradient_1X: Tensor
    ) -> dict[str, float]:
        """HUMAN_SUMS, each as ``human_…``, over all replicas; adds the loss's gradient to gradient_1X."""
        values: list[Tensor] = []
        for shard in shards:
            response_id_N = shard.annotation.response_id_N.to(self._device)
            sums = human_sums(self._reward(shard, omega).view(-1, 2), response_id_N.view(-1, 2))
            self._add_gradients((sums.bradley_terry,), gradient_1X)
            values.append(self._numbers(attrgetter(*HUMAN_SUMS)(sums)))
        return self._over_replicas([f"human_{name}" for name in HUMAN_SUMS], values)

    def _numbers(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.detach().to(self._device, torch.float64) for value in values])

    def _over_replicas(self, names: Sequence[str], values: Sequence[Tensor]) -> dict[str, float]:
        """The sum of each number over the shards of all replicas."""
        totals = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        for shard in values:
            totals += shard
        if self._world_size > 1:
            distributed.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))

    def _reward(self, shard: RewardShard, omega: float) -> Tensor:
        offsets = shard.annotation.layout.offsets.to(self._device)
        reward_N: Tensor = self._head(
            shard.annotation.rte_ND.to(self._device), shard.hidden_TP, offsets, omega
        )
        return reward_N

    def _grebt_sums(self, shard: RewardShard, reward_N: Tensor) -> GrebtSums:
        annotation = shard.annotation
        group_size = annotation.layout.group_size
        pair_reward_N = pair_rewards(self._config.pair_source, annotation, reward_N, shard.moment)
        return grebt_sums(
            reward_N.view(-1, group_size),
            pair_reward_N.detach().to(self._device).view(-1, group_size),
            annotation.response_id_N.to(self._device).view(-1, group_size),
            detach_stats=self._config.gre_detach_stats,
            min_margin=self._config.pair_min_margin,
        )

    def _add_gradients(self, losses: Sequence[Tensor], gradient_LX: Tensor) -> None:
        parameters = list(self._parameters.values())
        for row_X, loss in zip(gradient_LX, losses, strict=True):
            # At ω = 1 the cross-attention takes no part, and what autograd leaves out is 0.
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for total, part in zip(self._views(row_X), parts, strict=True):
                total += part

    def _row_sums(self, shard: RewardShard, reward_N: Tensor) -> list[Tensor]:
        """ROW_SUMS of a shard: rows, those with a reward that is not finite, now or when annotated, and over
        the finite ones ‖Ĥ‖/‖H_last‖ and attention entropy over the log of the row's length."""
        annotation = shard.annotation
        offsets = annotation.layout.offsets.to(self._device)
        seen = self._head.diagnostics(annotation.rte_ND.to(self._device), shard.hidden_TP, offsets)
        annotated_N = (annotation.reward_N + annotation.frozen_reward_N).to(self._device)
        finite_N = torch.isfinite(reward_N.detach() + annotated_N)
        relative_N = seen.entropy_N / offsets.diff().clamp(min=2).log()
        return [
            finite_N.sum(),
            (~finite_N).sum(),
            seen.norm_ratio_N[finite_N].double().sum(),
            relative_N[finite_N].double().sum(),
        ]

    def _mixed(self, losses: Sequence[Tensor], total: Mapping[str, float]) -> Tensor:
        """Eq. 7 over the valid pairs and groups of all replicas; losses as in L, or their gradients."""
        bradley_terry, entropy, *human = losses
        pairs = total["pairs"]
        if human:
            counts = (pairs, total["human_pairs"])
            bradley_terry = mixed_means(bradley_terry, human[0], counts=counts, weight=self._anchor)
            pairs = 1.0
        weight = self._config.entropy_weight
        return mixed_means(bradley_terry, entropy, counts=(pairs, total["groups"]), weight=weight)

    def _statistics(self, total: Mapping[str, float]) -> dict[str, float]:
        names = ("bradley_terry", "entropy", "human_bradley_terry")
        statistics = {
            "loss": float(self._mixed([torch.tensor(total[name]) for name in names if name in total], total)),
            "bradley_terry": _mean(total["bradley_terry"], total["pairs"]),
            "entropy": _mean(total["entropy"], total["groups"]),
            "margin": _mean(total["margin"], total["pairs"]),
            "flip_rate": _mean(total["flips"], total["pairs"]),
            "valid_pairs": _mean(total["pairs"], total["all_groups"]),
            "valid_groups": _mean(total["groups"], total["all_groups"]),
            "group_std": _mean(total["std"], total["all_groups"]),
            "feedback_ratio": _mean(total["feedback_ratio"], total["rows"]),
            "attention_entropy": _mean(total["attention_entropy"], total["rows"]),
            "nonfinite_rows": total["nonfinite_rows"],
        }
        if "human_pairs" in total:
            statistics["bradley_terry_human"] = _mean(total["human_bradley_terry"], total["human_pairs"])
            statistics["human_accuracy"] = _mean(total["human_correct"], total["human_pairs"])
            statistics["nonfinite_rows"] += total["human_nonfinite"]
        return statistics

    def _apply(self, gradient_X: Tensor) -> None:
        for parameter, part in zip(self._parameters.values(), self._views(gradient_X), strict=True):
            parameter.grad = part
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _views(self, gradient_X: Tensor) -> list[Tensor]:
        """The part of each parameter, in its shape."""
        parts = zip(gradient_X.split(self._sizes), self._parameters.values(), strict=True)
        return [part.view_as(parameter) for part, parameter in parts]


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def pair_rewards(source: PairSource, annotation: Annotation, reward_N: Tensor, moment: str) -> Tensor:
    """The rewards [N] whose highest and lowest row of a group are its pair (``reward.pair_source``).

    reward_N: the head's at the update. moment: run and step, which seed random pairs together with the shard.
    """
    match source:
        case PairSource.annotation:
            return annotation.reward_N
        case PairSource.recomputed:
            return reward_N
        case PairSource.frozen_rm:
            return annotation.frozen_reward_N
        case PairSource.gold:
            return annotation.gold_N
        case PairSource.random:
            return random_ranks(annotation, content_seed(moment, annotation.rte_ND))


def random_ranks(annotation: Annotation, seed: int) -> Tensor:
    """A random order of each group's rows as ranks 0 … K−1, float32 [N]: every ordered pair is as likely."""
    layout = annotation.layout
    generator = torch.Generator().manual_seed(seed)
    draw_GK = torch.rand(layout.groups, layout.group_size, generator=generator, dtype=torch.float64)
    return draw_GK.argsort(1).float().flatten()


def content_seed(moment: str, rte_ND: Tensor) -> int:
    """A seed of a moment and a shard, whose embeddings tell it apart from every other: the same on whichever
    replica holds the shard."""
    content = rte_ND.cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(f"{moment} ".encode() + content).digest()[:7])
