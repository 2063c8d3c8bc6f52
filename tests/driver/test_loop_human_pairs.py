"""The driver and people's pairs: the anchor of every step, and the warm-up before the first."""

from __future__ import annotations

import pytest
from driver_fakes import PAIRS, World, run, small_config

from r2m_ray.config.schema import Config


@pytest.fixture
def config() -> Config:
    return small_config()


def human_prompts(world: World) -> list[list[str]]:
    """Prompts of the pairs that each call for the policy's states was about."""
    return [[p for shard in call[1] for p in shard] for call in world.calls if call[0] == "states"]


def test_no_human_pair_is_drawn_unless_the_reward_is_anchored(config: Config) -> None:
    world = run(config)
    assert world.human == [([], []), ([], []), ([], [])]
    assert human_prompts(world) == []


def test_anchor_pairs_are_read_under_the_updated_policy_and_learned_from_before_the_next_step(
    config: Config,
) -> None:
    config.reward.anchor_fraction = 0.5
    world = run(config)
    names = [call[0] for call in world.calls if call[0] != "evaluate"]
    step = ["sample", "annotate", "reference", "look", "policy", "states", "annotate", "reward", "sync"]
    assert names == ["sync", *step, *step, *step]
    # The policy has been updated t times when step t reads its states: two shards of two pairs.
    assert [states for states, _ in world.human] == [[f"{t} updates h"] * 2 for t in (1, 2, 3)]
    assert [[note.layout.rows for note in notes] for _, notes in world.human] == [[4, 4]] * 3
    assert all(note.layout.group_size == 2 for _, notes in world.human for note in notes)
    # Annotated at the step's own ω; the step's own batch is what it was without an anchor.
    omegas = [[call[3] for call in world.calls if call[:2] == ("annotate", t)] for t in (1, 2, 3)]
    assert all(len(pair) == 2 and pair[0] == pair[1] for pair in omegas)
    assert all(call[2] == ["fresh h", "fresh h"] for call in world.calls if call[0] == "reward")


def test_a_resumed_run_draws_the_pairs_of_its_step(config: Config) -> None:
    config.reward.anchor_fraction = 1.0
    whole, resumed = human_prompts(run(config)), human_prompts(run(config, start=2))
    assert resumed == whole[2:]
    # 12 places of an order that holds each of 10 pairs once before it repeats one.
    assert len({prompt for step in whole for prompt in step}) == PAIRS
    assert len({*whole[0], *whole[1]}) == 8


def test_the_warm_up_comes_before_anything_else_of_a_new_run(config: Config) -> None:
    config.reward.warmup_pairs, config.reward.anchor_fraction = 6, 1.0
    config.algo.responses_per_prompt = 4
    world = run(config)
    head = world.calls[: [call[0] for call in world.calls].index("evaluate")]
    # As many rows at once as a step has: 8 pairs, so all 6; batches of 4 and of the remaining 2, at ω = Ω. A
    # shard has the rows of 2 groups of 4, which are 4 pairs.
    assert [call[0] for call in head] == ["sync", "states", "annotate", "warm up", "warm up"]
    assert [call[1:] for call in head if call[0] == "warm up"] == [
        ([4], ["0 updates h"], 0.6),
        ([2], ["0 updates h"], 0.6),
    ]
    assert [call[3] for call in head if call[0] == "annotate"] == [0.6]
    # The steps go on in the order where the warm-up stopped.
    order = [prompt for call in human_prompts(world) for prompt in call]
    assert len(order) == 6 + 3 * 4
    assert len(set(order[:PAIRS])) == PAIRS
    assert world.told == [
        "warm-up on 6 preference pairs, 2 batches: accuracy 0.500, Bradley–Terry 0.700 in its first 1; "
        "accuracy 0.500, Bradley–Terry 0.700 in its last 1"
    ]


@pytest.mark.parametrize(("responses", "shards"), [(2, [2, 2]), (3, [2, 2]), (6, [2, 2]), (8, [4])])
def test_a_batch_of_the_warm_up_is_whole_shards(responses: int, shards: list[int], config: Config) -> None:
    config.reward.warmup_pairs, config.algo.responses_per_prompt = 8, responses
    world = run(config)
    assert [call[1] for call in world.calls if call[0] == "warm up"] == [shards, shards]


def test_a_resumed_run_is_not_warmed_up_again(config: Config) -> None:
    config.reward.warmup_pairs, config.reward.anchor_fraction = 6, 1.0
    whole, resumed = run(config), run(config, start=1)
    assert resumed.told == []
    assert human_prompts(resumed) == human_prompts(whole)[-2:]
