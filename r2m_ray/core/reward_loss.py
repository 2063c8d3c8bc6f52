"""GREBT, the reward head's loss: Bradley–Terry on each group's best and worst row plus group reward entropy.

Axes: G groups, K rows per group. Losses come as sums and counts over *valid* groups, so that replicas
which skip different groups can add both up and still take the mean of the full batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from r2m_ray.core.advantages import tied

SMALLEST_STD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class GrebtSums:
    """Scalar sums over some groups; adding two of them field by field describes their union.

    bradley_terry, entropy: the losses of Eqs. 5 and 6, with gradients, over `pairs` and `groups`.
    pairs: groups with a valid winner–loser pair; groups: those with a valid entropy; all_groups: every one.
    margin: winner minus loser under the current reward; flips: pairs where it is negative, so that the
    current reward contradicts the pair's order; both over `pairs`.
    std: of each group's current reward (ddof 0), over `all_groups`.
    All but the two losses are detached; counts are in the reward's dtype.
    """

    bradley_terry: Tensor
    entropy: Tensor
    pairs: Tensor
    groups: Tensor
    all_groups: Tensor
    margin: Tensor
    flips: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanSums:
    """Scalar sums over pairs that people ordered; adding two of them describes their union.

    bradley_terry: the loss of Eq. 5, with gradients. pairs: those whose rows are not the same tokens.
    correct: pairs whose preferred row has the higher current reward. nonfinite: rows, of any pair, whose
    current reward is not finite. All but the loss are detached; counts are in the reward's dtype.
    """

    bradley_terry: Tensor
    pairs: Tensor
    correct: Tensor
    nonfinite: Tensor


def bradley_terry(winner_r: Tensor, loser_r: Tensor) -> Tensor:
    """`−log σ(r_w − r_l)` of each pair (Eq. 5), any shape; finite wherever the rewards are."""
    return -logsigmoid(winner_r - loser_r)


def group_reward_entropy(reward_GK: Tensor, *, detach_stats: bool = False) -> tuple[Tensor, Tensor]:
    """Entropy of each group's standardised rewards (Eq. 6): `z = (r−mean)/std; p = softmax(z); −Σ p log p`.

    std has ddof 0. Returns loss_G and valid_G (bool). The loss depends on z only, so its gradient does not
    change a group's spread, unless `detach_stats` takes mean and std as constants. A group with std below
    1e-6 has loss 0, gradient 0 and valid false. NaN passes through as valid, so that it is seen.

    Raises ValueError for K < 2.
    """
    if reward_GK.ndim != 2 or reward_GK.shape[1] < 2:
        raise ValueError(f"reward_GK must be [G, K] with K >= 2, got {list(reward_GK.shape)}")
    valid_G = ~(reward_GK.detach().std(1, correction=0) < SMALLEST_STD)
    # Masked before the square root and again after it: the root's gradient at 0 is infinite, and 0·∞ is NaN.
    safe_GK = torch.where(valid_G[:, None], reward_GK, 0)
    source_GK = safe_GK.detach() if detach_stats else safe_GK
    mean_G1 = source_GK.mean(1, keepdim=True)
    variance_G1 = torch.where(valid_G[:, None], source_GK.var(1, correction=0, keepdim=True), 1)
    logp_GK = torch.log_softmax((safe_GK - mean_G1) / variance_G1.sqrt(), 1)
    entropy_G = -(logp_GK.exp() * logp_GK).sum(1)
    return torch.where(valid_G, entropy_G, 0), valid_G


def group_pairs(
    pair_reward_GK: Tensor, response_id_GK: Tensor, *, min_margin: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner and loser of each group: columns int64 [G] of highest and lowest reward, and valid_G (bool).

    A pair is not valid when max − min < 1e-6·max(1, |mean|), or when both rows are the same tokens (equal
    response ids): a zero-margin pair would push with gradient ½ in a random direction. Nor when
    max − min < `min_margin`: a label that hangs on a small difference is often wrong.
    """
    pair_reward_GK = pair_reward_GK.detach()
    winner_G, loser_G = pair_reward_GK.argmax(1), pair_reward_GK.argmin(1)
    same_G = (response_id_GK.gather(1, winner_G[:, None]) == response_id_GK.gather(1, loser_G[:, None]))[:, 0]
    close_G = pair_reward_GK.amax(1) - pair_reward_GK.amin(1) < min_margin
    return winner_G, loser_G, ~(tied(pair_reward_GK) | close_G | same_G)


def grebt_sums(
    reward_GK: Tensor,
    pair_reward_GK: Tensor,
    response_id_GK: Tensor,
    *,
    detach_stats: bool = False,
    min_margin: float = 0.0,
) -> GrebtSums:
    """Sums of both losses over the valid groups of a batch or of one shard of it.

    reward_GK: the head's current rewards, with gradients. pair_reward_GK: the rewards that define winner and
    loser (the annotation's; pass reward_GK itself to recompute pairs). response_id_GK: int64, equal for
    rows of a group that are the same tokens. min_margin: of a pair that is valid, under pair_reward_GK.
    """
    winner_G, loser_G, pair_G = group_pairs(pair_reward_GK, response_id_GK, min_margin=min_margin)
    winner_r = reward_GK.gather(1, winner_G[:, None])[:, 0]
    loser_r = reward_GK.gather(1, loser_G[:, None])[:, 0]
    entropy_G, entropy_valid_G = group_reward_entropy(reward_GK, detach_stats=detach_stats)
    margin_G = torch.where(pair_G, (winner_r - loser_r).detach(), 0)
    dtype = reward_GK.dtype
    return GrebtSums(
        bradley_terry=torch.where(pair_G, bradley_terry(winner_r, loser_r), 0).sum(),
        entropy=entropy_G.sum(),
        pairs=pair_G.sum().to(dtype),
        groups=entropy_valid_G.sum().to(dtype),
        all_groups=torch.full((), reward_GK.shape[0], dtype=dtype, device=reward_GK.device),
        margin=margin_G.sum(),
        flips=(margin_G < 0).sum().to(dtype),
        std=reward_GK.detach().std(1, correction=0).sum(),
    )


def human_sums(reward_G2: Tensor, response_id_G2: Tensor) -> HumanSums:
    """Sums of `−log σ(r_chosen − r_rejected)` (Eq. 5) over pairs that people ordered, preferred row first.

    The order is the people's, whatever the rewards say, so a margin of 0 teaches too; a pair of the same
    tokens (equal response ids) does not.
    """
    valid_G = response_id_G2[:, 0] != response_id_G2[:, 1]
    chosen_r, rejected_r = reward_G2.unbind(1)
    return HumanSums(
        bradley_terry=torch.where(valid_G, bradley_terry(chosen_r, rejected_r), 0).sum(),
        pairs=valid_G.sum().to(reward_G2.dtype),
        correct=(valid_G & (chosen_r > rejected_r)).sum().to(reward_G2.dtype),
        nonfinite=(~torch.isfinite(reward_G2.detach())).sum().to(reward_G2.dtype),
    )


def mixed_means(
    first: Tensor, second: Tensor, *, counts: tuple[float | Tensor, float | Tensor], weight: float
) -> Tensor:
    """`(1−w)·first/n₁ + w·second/n₂` for counts n₁ and n₂, where a mean over none is 0.

    Eq. 7 with Bradley–Terry and entropy summed over valid pairs and groups and w = α; and the share w that
    people's pairs have of Bradley–Terry. The sums are losses or, as means are linear, gradients of any shape.
    Where replicas hold shares of the batch, the counts must be those of all of them; their mixes then add up
    to that of the full batch.
    """
    n1, n2 = (torch.as_tensor(count).clamp(min=1) for count in counts)
    mixed: Tensor = (1 - weight) * (first / n1) + weight * (second / n2)
    return mixed
