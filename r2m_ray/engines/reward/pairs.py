"""Who picks winner and loser of a Bradley–Terry pair, and draws that any replica repeats.

Axes: N rows, D reward-model width.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from r2m_ray.config.schema import PairSource
from r2m_ray.core.batch import Annotation


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
