"""People's pairs: their order, the anchor of every step, and the warm-up before the first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_roles import FakeRoles, World
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Config
from r2m_ray.driver.human_pairs import drawn, warm_up_summary
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.errors import Preempted
from r2m_ray.tasks.data import PreferencePair, packed_pairs


def test_a_place_holds_the_same_pair_in_any_order_of_asking() -> None:
    every = drawn(10, 0, 35, seed=3)
    for first, count in ((0, 7), (7, 7), (8, 25), (34, 1)):
        assert drawn(10, first, count, seed=3) == every[first : first + count]


def test_each_pass_holds_every_pair_once_in_an_order_of_pass_and_seed() -> None:
    passes = [drawn(50, 50 * turn, 50, seed=0) for turn in range(4)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in [*passes, drawn(50, 0, 50, seed=1)]}) == 5


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


def prompts_of(fake: FakeRoles) -> list[list[str]]:
    """Prompts of the pairs that each call for the policy's states was about."""
    return [[prompt for shard in shards for prompt in shard] for (shards,) in fake.of("states")]


def warm_up_messages(messages: object) -> list[str]:
    return [line for line in messages if line.startswith("warm-up ")]


def test_no_human_pair_is_drawn_unless_the_reward_is_anchored(config: Config, world: World) -> None:
    fake = world.train(config).fake
    assert [call[3:] for call in fake.of("reward")] == [([], [])] * 3
    assert prompts_of(fake) == []


def test_anchor_pairs_are_read_under_the_updated_policy_and_learned_from_before_the_next_step(
    config: Config, world: World
) -> None:
    config.reward.anchor_fraction, config.logging.rollouts_per_step = 0.5, 0
    fake = world.train(config).fake
    step = ["sample", "annotate", "reference", "policy", "states", "annotate", "reward", "sync"]
    assert fake.names == ["sync", *step, *step, *step]
    # The policy was updated t times when step t reads its states: two shards of two pairs.
    fresh = [[f"h after {t} updates"] * 2 for t in (1, 2, 3)]
    assert [call[3] for call in fake.of("reward")] == fresh
    assert [call[4] for call in fake.of("reward")] == [[2, 2]] * 3
    # Annotated at the step's own ω; the step's own batch is what it was without an anchor.
    omegas = [[omega for t, omega, _ in fake.of("annotate") if t == step] for step in (1, 2, 3)]
    assert all(len(pair) == 2 and pair[0] == pair[1] for pair in omegas)
    assert [call[2] for call in fake.of("reward")] == fresh


def test_the_warm_up_comes_before_anything_else_of_a_new_run_and_is_not_repeated(
    config: Config, world: World
) -> None:
    config.reward.warmup_pairs, config.reward.anchor_fraction = 6, 1.0
    config.algo.responses_per_prompt, config.checkpoint.every = 4, 1
    run = world.train(config)
    fake = run.fake
    # As many rows at once as a step has: 8 pairs, so all 6; batches of 4 and of the remaining 2, at ω = Ω. A
    # shard has the rows of 2 groups of 4, which are 4 pairs.
    assert fake.names[:6] == ["sync", "states", "annotate", "warm up", "warm up", "sample"]
    first = ["h after 0 updates"]
    assert fake.of("warm up") == [([4], first, 0.6), ([2], first, 0.6)]
    assert fake.of("annotate")[0][1] == 0.6
    # The steps go on in the order where the warm-up stopped: 10 pairs, each once before one comes again.
    order = [prompt for call in prompts_of(fake) for prompt in call]
    assert len(order) == 6 + 3 * 4
    assert len(set(order[:10])) == 10
    assert warm_up_messages(run.messages) == [
        "warm-up on 6 preference pairs, 2 batches: accuracy 0.500, Bradley–Terry 0.700 in its first 1; "
        "accuracy 0.500, Bradley–Terry 0.700 in its last 1"
    ]
    other = replace(world, directory=world.directory / "other")
    other.train(config, ends=Preempted, stop_in=1)
    config.run.resume = True
    resumed = other.train(config)
    assert warm_up_messages(resumed.messages) == resumed.fake.of("warm up") == []
    assert prompts_of(resumed.fake) == prompts_of(fake)[-2:]


@pytest.mark.parametrize(("responses", "shards"), [(2, [2, 2]), (3, [2, 2]), (6, [2, 2]), (8, [4])])
def test_a_batch_of_the_warm_up_is_complete_shards(
    responses: int, shards: list[int], config: Config, world: World
) -> None:
    config.reward.warmup_pairs, config.algo.responses_per_prompt = 8, responses
    assert [call[0] for call in world.train(config).fake.of("warm up")] == [shards, shards]
