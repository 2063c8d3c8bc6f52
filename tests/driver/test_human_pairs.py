"""The order that people's pairs come in, and how they are packed."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from r2m_ray.driver.human_pairs import drawn, warm_up_summary
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.tasks.data import PreferencePair, packed_pairs


def test_a_place_holds_the_same_pair_however_it_is_come_to() -> None:
    whole = drawn(10, 0, 35, seed=3)
    for first, count in ((0, 7), (7, 7), (8, 25), (34, 1)):
        assert drawn(10, first, count, seed=3) == whole[first : first + count]


def test_each_pass_holds_every_pair_once_in_another_order() -> None:
    passes = [drawn(50, 50 * turn, 50, seed=0) for turn in range(4)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4


def test_another_seed_is_another_order() -> None:
    assert drawn(50, 0, 50, seed=0) != drawn(50, 0, 50, seed=1)


def test_pairs_are_groups_of_two_rows_the_chosen_one_first(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [
        PreferencePair(prompt=f"w{i} w9", chosen=f"w2{i} w3{i}", rejected=f"w4{i} w1 w2") for i in range(5)
    ]
    shards = packed_pairs(tiny_tokenizer, pairs, pairs_per_shard=2, version=7)
    assert [shard.layout.groups for shard in shards] == [2, 2, 1]
    assert {(shard.layout.group_size, shard.version) for shard in shards} == {(2, 7)}
    assert [text for shard in shards for text in shard.responses] == [
        text for pair in pairs for text in (pair.chosen, pair.rejected)
    ]
    assert [prompt for shard in shards for prompt in shard.prompts] == [pair.prompt for pair in pairs]
    # The second pair's rejected response is row 3 of the first shard.
    part = shards[0].layout.slice_of(3)
    prompt = policy_prompt_ids(tiny_tokenizer, "w1 w9")
    response = policy_response_ids(tiny_tokenizer, "w41 w1 w2")
    assert shards[0].input_T[part].tolist() == [*prompt, *response][:-1]
    assert shards[0].label_T[part][shards[0].action_T[part]].tolist() == response


def test_a_warm_up_is_summed_up_by_its_first_and_last_tenth() -> None:
    stats = [
        {"human_accuracy": n / 40, "bradley_terry_human": 1 - n / 100, "nonfinite_steps": float(n == 5)}
        for n in range(20)
    ]
    assert warm_up_summary(320, stats) == (
        "warm-up on 320 preference pairs, 20 batches: accuracy 0.013, Bradley–Terry 0.995 in its first 2; "
        "accuracy 0.463, Bradley–Terry 0.815 in its last 2; 1 were not finite, and were skipped"
    )
    assert sum(s["human_accuracy"] for s in stats[:2]) / 2 == pytest.approx(0.0125)
