"""The optimizer of the R2M head: GREBT over all replicas' groups as if they were one replica's.

Axes: G groups, K rows per group, T packed tokens, P policy width, X all head parameters end to end.

Both losses are sums over valid groups, and gradients are linear in them. So each replica adds up the
gradients of its groups, sums and counts are added over replicas, and only then the means of Eq. 7 are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.optim import AdamW

from r2m_ray.batch import Annotation
from r2m_ray.config import PairSource, RewardConfig
from r2m_ray.core.head import R2MHead
from r2m_ray.core.reward_loss import GrebtSums, grebt_loss, grebt_sums
from r2m_ray.models.reward_head import read_json, read_tensors

TENSORS_FILE = "optimizer.safetensors"
INFO_FILE = "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

GREBT_SUMS = tuple(field.name for field in fields(GrebtSums))
ATTENTION_SUMS = ("rows", "feedback_ratio", "attention_entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardShard:
    """A shard as the head reads it: hidden_TP [T, P] on the head's device, and its annotation."""

    hidden_TP: Tensor
    annotation: Annotation


class HeadTrainer:
    """AdamW (0.9, 0.999, no weight decay) on cross-attention and φ, alike on every replica.

    With world_size > 1 the default process group must exist, and every replica must call `step` as often.
    """

    def __init__(self, head: R2MHead, config: RewardConfig, *, world_size: int) -> None:
        self._head = head
        self._config = config
        self._world_size = world_size
        self._parameters = dict(head.named_parameters())
        self._optimizer = AdamW(
            self._parameters.values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0
        )

    def step(self, shards: Iterable[RewardShard], omega: float) -> dict[str, float]:
        """Take one optimizer step on the mean GREBT of all replicas' groups (Eqs. 5–7).

        The shards are read one at a time; a replica may have none. Returns statistics from before the step,
        equal on all replicas (`RewardEngine.update` lists them). The step is skipped, on all replicas alike,
        where the gradient is not finite or is 0, so that momentum alone moves nothing.
        """
        device = self._head.score_weight.device
        gradient_2X = torch.zeros(2, sum(p.numel() for p in self._parameters.values()), device=device)
        totals = torch.zeros(len(GREBT_SUMS) + len(ATTENTION_SUMS), dtype=torch.float64, device=device)
        for shard in shards:
            sums = self._add_gradients(shard, omega, gradient_2X)
            totals += torch.cat([sums, self._attention_sums(shard)])
        if self._world_size > 1:
            distributed.all_reduce(totals)
            distributed.all_reduce(gradient_2X)
        total = dict(zip(GREBT_SUMS + ATTENTION_SUMS, totals.tolist(), strict=True))

        alpha = self._config.entropy_weight
        pairs, groups = max(total["pairs"], 1.0), max(total["groups"], 1.0)
        bradley_terry_norm, entropy_norm = gradient_2X.norm(dim=1).tolist()
        gradient_X = gradient_2X[0].mul_((1 - alpha) / pairs).add_(gradient_2X[1], alpha=alpha / groups)
        norm = float(gradient_X.norm())
        taken = math.isfinite(norm) and norm > 0
        if taken:
            self._apply(gradient_X.mul_(min(1.0, self._config.max_grad_norm / norm)))
        return {
            **_statistics(total, alpha),
            "gradient_norm": norm,
            "gradient_norm_bradley_terry": bradley_terry_norm / pairs,
            "gradient_norm_entropy": entropy_norm / groups,
            "skipped_steps": float(not taken),
        }

    def save(self, directory: Path) -> None:
        """Write AdamW's moments as ``optimizer.safetensors`` and its step count as ``optimizer.json``."""
        states = [(name, self._optimizer.state[p]) for name, p in self._parameters.items()]
        states = [(name, state) for name, state in states if state]
        tensors = {f"{name}.{moment}": state[moment].cpu() for name, state in states for moment in MOMENTS}
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

    def _add_gradients(self, shard: RewardShard, omega: float, gradient_2X: Tensor) -> Tensor:
        """Add each loss's gradient, summed over the shard's valid groups, to its row; returns GREBT_SUMS."""
        annotation = shard.annotation
        group_size = annotation.layout.group_size
        device = gradient_2X.device
        offsets = annotation.layout.offsets.to(device)
        reward_N = self._head(annotation.rte_ND.to(device), shard.hidden_TP, offsets, omega)
        pair_reward_N = {
            PairSource.annotation: annotation.reward_N,
            PairSource.frozen_rm: annotation.frozen_reward_N,
            PairSource.recomputed: reward_N,
        }[self._config.pair_source]
        sums = grebt_sums(
            reward_N.view(-1, group_size),
            pair_reward_N.detach().to(device).view(-1, group_size),
            annotation.response_id_N.to(device).view(-1, group_size),
            detach_stats=self._config.gre_detach_stats,
        )
        parameters = list(self._parameters.values())
        for row_X, loss in zip(gradient_2X, (sums.bradley_terry, sums.entropy), strict=True):
            # At ω = 1 the cross-attention takes no part, and what autograd leaves out is 0.
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for total, part in zip(self._views(row_X), parts, strict=True):
                total += part
        return torch.stack([value.detach().double() for value in attrgetter(*GREBT_SUMS)(sums)])

    def _attention_sums(self, shard: RewardShard) -> Tensor:
        """ATTENTION_SUMS of a shard: rows, ‖Ĥ‖/‖H_last‖, and attention entropy over the log of the length."""
        device = shard.hidden_TP.device
        offsets = shard.annotation.layout.offsets.to(device)
        seen = self._head.diagnostics(shard.annotation.rte_ND.to(device), shard.hidden_TP, offsets)
        uniform_N = offsets.diff().clamp(min=2).log()
        return torch.stack(
            [
                torch.tensor(seen.entropy_N.numel(), dtype=torch.float64, device=device),
                seen.norm_ratio_N.double().sum(),
                (seen.entropy_N / uniform_N).double().sum(),
            ]
        )

    def _apply(self, gradient_X: Tensor) -> None:
        for parameter, part in zip(self._parameters.values(), self._views(gradient_X), strict=True):
            parameter.grad = part
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _views(self, gradient_X: Tensor) -> list[Tensor]:
        """The part of each parameter, in its shape."""
        parameters = list(self._parameters.values())
        parts = torch.split(gradient_X, [parameter.numel() for parameter in parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def _statistics(total: dict[str, float], alpha: float) -> dict[str, float]:
    sums = GrebtSums(**{name: torch.tensor(total[name]) for name in GREBT_SUMS})
    return {
        "loss": float(grebt_loss(sums, entropy_weight=alpha)),
        "bradley_terry": _mean(total["bradley_terry"], total["pairs"]),
        "entropy": _mean(total["entropy"], total["groups"]),
        "margin": _mean(total["margin"], total["pairs"]),
        "flip_rate": _mean(total["flips"], total["pairs"]),
        "valid_pairs": _mean(total["pairs"], total["all_groups"]),
        "valid_groups": _mean(total["groups"], total["all_groups"]),
        "group_std": _mean(total["std"], total["all_groups"]),
        "feedback_ratio": _mean(total["feedback_ratio"], total["rows"]),
        "attention_entropy": _mean(total["attention_entropy"], total["rows"]),
    }


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
