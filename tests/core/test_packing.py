from __future__ import annotations

import random

import pytest
import torch
from heads import packed
from hypothesis import given, settings
from hypothesis import strategies as st

from r2m_ray.core.packing import microbatches, position_ids, row_index, segment_sum, select_rows

row_lengths = st.lists(st.integers(0, 60), max_size=40)
lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def test_first_fit_decreasing_by_hand() -> None:
    assert microbatches([3, 7, 5, 5, 2, 8], 10) == [[4, 5], [0, 1], [2, 3]]


@settings(deadline=None, max_examples=100)
@given(row_lengths, st.integers(1, 100))
def test_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = microbatches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch == sorted(batch)
        assert sum(lengths[row] for row in batch) <= budget or len(batch) == 1


@settings(deadline=None, max_examples=100)
@given(row_lengths, st.integers(1, 100))
def test_no_two_batches_could_be_one(lengths: list[int], budget: int) -> None:
    loads = [sum(lengths[row] for row in batch) for batch in microbatches(lengths, budget)]
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


@settings(deadline=None, max_examples=100)
@given(row_lengths, st.integers(1, 100), st.randoms(use_true_random=False))
def test_the_rows_order_does_not_matter(lengths: list[int], budget: int, rng: random.Random) -> None:
    def contents(values: list[int]) -> list[list[int]]:
        return [sorted(values[row] for row in batch) for batch in microbatches(values, budget)]

    shuffled = rng.sample(lengths, len(lengths))
    assert contents(shuffled) == contents(lengths)


def test_a_tensor_of_lengths_is_accepted() -> None:
    assert microbatches(torch.tensor([4, 4, 4]), 8) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [([1], 0, "token_budget must be at least 1"), ([3, -1], 4, "row 1 has negative length -1")],
)
def test_bad_input_is_refused(lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        microbatches(lengths, budget)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_positions_restart_with_each_row(lengths: list[int]) -> None:
    expected = [position for length in lengths for position in range(length)]
    assert position_ids(packed(lengths)).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_selected_rows_keep_their_tokens(data: st.DataObject, lengths: list[int]) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    value_T = torch.arange(sum(lengths))
    index, offsets = select_rows(packed(lengths), rows)
    assert offsets.tolist() == packed([lengths[row] for row in rows]).tolist()
    by_row = torch.split(value_T, lengths)
    expected = [value for row in rows for value in by_row[row].tolist()]
    assert value_T[index].tolist() == expected


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_of_rows, trailing=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99))
def test_sums_equal_loops(lengths: list[int], trailing: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value_T = torch.randn(sum(lengths), *trailing, generator=generator, dtype=torch.float64)
    rows = torch.split(value_T, lengths)
    zero = torch.zeros(trailing, dtype=torch.float64)
    torch.testing.assert_close(
        segment_sum(value_T, packed(lengths)), torch.stack([row.sum(0) if len(row) else zero for row in rows])
    )


@settings(deadline=None, max_examples=30)
@given(lengths=lengths_of_rows)
def test_row_index_equals_loops(lengths: list[int]) -> None:
    expected = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert row_index(packed(lengths)).tolist() == expected


def test_gradients() -> None:
    value_T = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: segment_sum(value, packed([3, 0, 1, 3])), (value_T,))


def test_an_empty_batch_reduces_to_zeros() -> None:
    assert segment_sum(torch.zeros(0), packed([0, 0])).tolist() == [0, 0]
