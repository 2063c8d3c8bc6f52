from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2m_ray.core.segment import row_index, segment_sum

Packed = Callable[[Sequence[int]], Tensor]
lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_of_rows, trailing=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99))
def test_sums_equal_loops(packed: Packed, lengths: list[int], trailing: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value_T = torch.randn(sum(lengths), *trailing, generator=generator, dtype=torch.float64)
    rows = torch.split(value_T, lengths)
    zero = torch.zeros(trailing, dtype=torch.float64)
    torch.testing.assert_close(
        segment_sum(value_T, packed(lengths)), torch.stack([row.sum(0) if len(row) else zero for row in rows])
    )


@settings(deadline=None, max_examples=30)
@given(lengths=lengths_of_rows)
def test_row_index_equals_loops(packed: Packed, lengths: list[int]) -> None:
    expected = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert row_index(packed(lengths)).tolist() == expected


def test_gradients(packed: Packed) -> None:
    value_T = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: segment_sum(value, packed([3, 0, 1, 3])), (value_T,))


def test_an_empty_batch_reduces_to_zeros(packed: Packed) -> None:
    assert segment_sum(torch.zeros(0), packed([0, 0])).tolist() == [0, 0]
