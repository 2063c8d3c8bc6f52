"""Do hidden states know good from bad: their cosine similarity, layer by layer, by gold label.

Axes: L layers, N responses, P width. Two labels, the better and the worse half of each prompt's responses. If
a layer knows what gold values, states of the same label are more alike than states of different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r2m_ray.report.data import Series

Labels = NDArray[np.int8]
HIGH, LOW, NEITHER = 1, 0, -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Similarity:
    """Mean cosine similarity over pairs of responses, float64 [L], and how many pairs there were.

    same_L: both of one label, over the pairs of both labels together. different_L: one of each.
    """

    same_L: Series
    different_L: Series
    same_pairs: int
    different_pairs: int

    @property
    def difference_L(self) -> Series:
        """How much more alike states of the same label are."""
        return self.same_L - self.different_L


def halves(gold_N: Series, prompt_N: NDArray[np.int64]) -> Labels:
    """HIGH above the median of a prompt's gold scores, LOW below it, NEITHER at it; int8 [N].

    Raises ValueError for scores that are not finite.
    """
    if not np.isfinite(gold_N).all():
        raise ValueError("gold scores are not finite")
    label_N = np.full(len(gold_N), NEITHER, dtype=np.int8)
    for prompt in np.unique(prompt_N):
        rows = np.flatnonzero(prompt_N == prompt)
        middle = np.median(gold_N[rows])
        label_N[rows[gold_N[rows] > middle]] = HIGH
        label_N[rows[gold_N[rows] < middle]] = LOW
    return label_N


def similarity(
    hidden_LNP: Series, label_N: Labels, prompt_N: NDArray[np.int64], *, within_prompts: bool
) -> Similarity:
    """Similarity by label of every layer's states.

    hidden_LNP: h pooled over each response. label_N: of `halves`; responses of NEITHER take no part.
    within_prompts: whether the pairs are responses to one prompt, or to two different ones. Never both:
    states share their prompt's topic, and a prompt has more pairs of different labels than of the same one.
    Raises ValueError for states that are not finite or have no direction, and where one kind has no pairs.
    """
    kept_N = label_N != NEITHER
    label_N, prompt_N, hidden_LNP = label_N[kept_N], prompt_N[kept_N], hidden_LNP[:, kept_N]
    norm_LN1 = np.linalg.norm(hidden_LNP, axis=2, keepdims=True)
    if not (np.isfinite(norm_LN1).all() and (norm_LN1 > 0).all()):
        raise ValueError("a hidden state is zero or not finite")
    unit_LNP = hidden_LNP / norm_LN1
    prompts, group_N = np.unique(prompt_N, return_inverse=True)
    sums, counts = _sums(unit_LNP, label_N, group_N, len(prompts))
    inside = _pairs(sums, counts)
    # All responses as one prompt's give all pairs.
    every = _pairs(sums.sum(2, keepdims=True), counts.sum(1, keepdims=True))
    (same_L, same), (different_L, different) = inside if within_prompts else _outside(every, inside)
    if not (same and different):
        raise ValueError(f"{same} pairs of the same label and {different} of different ones to compare")
    return Similarity(
        same_L=same_L / same, different_L=different_L / different, same_pairs=same, different_pairs=different
    )


_Sums = tuple[tuple[Series, int], tuple[Series, int]]
"""Of the pairs of the same and of different labels: their cosines' sum [L], and their number."""


def _sums(
    unit_LNP: Series, label_N: Labels, group_N: NDArray[np.int64], groups: int
) -> tuple[Series, NDArray[np.int64]]:
    """Sum of the unit vectors of each label and prompt, [2, L, groups, P], and their number, [2, groups]."""
    layers, _, width = unit_LNP.shape
    sums = np.zeros((2, groups, layers, width))
    counts = np.zeros((2, groups), dtype=np.int64)
    np.add.at(sums, (label_N, group_N), unit_LNP.transpose(1, 0, 2))
    np.add.at(counts, (label_N, group_N), 1)
    return sums.transpose(0, 2, 1, 3), counts


def _pairs(sums: Series, counts: NDArray[np.int64]) -> _Sums:
    """Cosines of the pairs within each prompt: `Σ_{i<j} u_i·u_j = (‖Σu‖² − n)/2`; across labels `Σu·Σv`."""
    squares_L = (sums**2).sum((0, 2, 3))
    same_L = (squares_L - counts.sum()) / 2
    different_L = (sums[0] * sums[1]).sum((1, 2))
    return (
        (same_L, int((counts * (counts - 1) // 2).sum())),
        (different_L, int((counts[0] * counts[1]).sum())),
    )


def _outside(every: _Sums, inside: _Sums) -> _Sums:
    """The pairs of two different prompts: all but those within one."""
    (same_L, same), (different_L, different) = (
        (all_L - inner_L, number - inner)
        for (all_L, number), (inner_L, inner) in zip(every, inside, strict=True)
    )
    return (same_L, same), (different_L, different)
