from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.segment import row_index, segment_mean, segment_softmax, segment_sum

Packed = Callable[[Sequence[int]], Tensor]
lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_of_rows, trailing=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99))
def test_sum_and_mean_equal_loops(
    packed: Packed, lengths: list[int], trailing: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value_T = torch.randn(sum(lengths), *trailing, generator=generator, dtype=torch.float64)
    rows = torch.split(value_T, lengths)
    zero = torch.zeros(trailing, dtype=torch.float64)
    torch.testing.assert_close(
        segment_sum(value_T, packed(lengths)), torch.stack([row.sum(0) if len(row) else zero for row in rows])
    )
    torch.testing.assert_close(
        segment_mean(value_T, packed(lengths)),
        torch.stack([row.mean(0) if len(row) else zero for row in rows]),
    )


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_of_rows, shift=st.sampled_from([0.0, 1e4, -1e4]), seed=st.integers(0, 99))
def test_softmax_equals_loops(packed: Packed, lengths: list[int], shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_T = 5 * torch.randn(sum(lengths), generator=generator, dtype=torch.float64) + shift
    expected = torch.cat([torch.softmax(row, 0) for row in torch.split(score_T, lengths)])
    torch.testing.assert_close(segment_softmax(score_T, packed(lengths)), expected)


@settings(deadline=None, max_examples=30)
@given(lengths=lengths_of_rows)
def test_row_index_equals_loops(packed: Packed, lengths: list[int]) -> None:
    expected = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert row_index(packed(lengths)).tolist() == expected


@pytest.mark.parametrize("reduction", [segment_sum, segment_mean, segment_softmax])
def test_gradients(packed: Packed, reduction: Callable[[Tensor, Tensor], Tensor]) -> None:
    value_T = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: reduction(value, packed([3, 0, 1, 3])), (value_T,))


def test_softmax_of_separated_scores_is_finite_with_finite_gradients(packed: Packed) -> None:
    score_T = torch.tensor([1e30, -1e30, 0.0], requires_grad=True)
    weight_T = segment_softmax(score_T, packed([2, 1]))
    assert weight_T.tolist() == [1, 0, 1]
    torch.autograd.backward((weight_T * torch.arange(3)).sum())
    assert score_T.grad is not None
    assert score_T.grad.tolist() == [0, 0, 0]


def test_an_empty_batch_reduces_to_zeros(packed: Packed) -> None:
    assert segment_sum(torch.zeros(0), packed([0, 0])).tolist() == [0, 0]
    assert segment_mean(torch.zeros(0), packed([0, 0])).tolist() == [0, 0]
    assert segment_softmax(torch.zeros(0), packed([0, 0])).tolist() == []
