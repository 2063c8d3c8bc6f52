"""R2M heads of a few numbers, and what they are fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r2m_ray.core.head import R2MHead

Packed = Callable[[Sequence[int]], Tensor]

CROSS_ATTENTION = {"w_q", "w_k", "w_v", "w_o"}

P, D, E = 11, 7, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(
    policy_width: int = P, reward_width: int = D, width: int = E, *, bias: bool = True, std: float = 0.4
) -> R2MHead:
    return R2MHead(
        policy_width,
        reward_width,
        width,
        random(1, reward_width, seed=1),
        random(1, seed=2) if bias else None,
        init_std=std,
        generator=torch.Generator().manual_seed(3),
    )


def gradients(module: R2MHead) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}
