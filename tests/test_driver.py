"""The driver against in-process fakes of the roles: order, versions, ω, and which h goes where."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r2m_ray.batch import Annotation, ReferenceLogprobs, Trajectories, pack_rows
from r2m_ray.config import (
    AlgoConfig,
    Config,
    KLEstimator,
    KLPlace,
    OmegaSchedule,
    RewardConfig,
    RewardScale,
    RewardShape,
)
from r2m_ray.data import PreferencePair
from r2m_ray.driver import advantages, omega_at, train
from r2m_ray.errors import Alarmed, Preempted
from r2m_ray.human_pairs import HumanPairs
from r2m_ray.metrics import step_metrics
from r2m_ray.roles import LabelledPairs, Prompt, Roles, SamplePlan, sample_plans

K = 2
PAIRS = 10


def ready(value: Any) -> Any:
    """A reference to a value that is already there; it can be read many times, like an object reference."""

    class Ready:
        def __await__(self) -> Iterator[Any]:
            yield from ()
            return value

    return Ready()


def rows(plan: SamplePlan, version: int) -> Trajectories:
    count = len(plan.prompts) * plan.group_size
    return pack_rows(
        [p.text for p in plan.prompts],
        [[1, 4] for _ in plan.prompts],
        [[5 + n, 2] for n in range(count)],
        [f"r{n}" for n in range(count)],
        logprobs=[[-1.0, -0.5]] * count,
        version=version,
    )


def annotated(shard: Trajectories, reward: Sequence[float], frozen: Sequence[float]) -> Annotation:
    count = shard.layout.rows
    return Annotation(
        layout=shard.layout,
        reward_N=torch.tensor(reward),
        frozen_reward_N=torch.tensor(frozen),
        gold_N=torch.full((count,), math.nan),
        rte_ND=torch.zeros(count, 1),
        response_id_N=torch.arange(count),
    )


def reference_two_nats_away(shard: Trajectories) -> ReferenceLogprobs:
    """Row 0 moved by log-probs −1.0 and −0.5 against −2.0 and −1.5: KL 2; the other rows not at all."""
    base = shard.rollout_logp_T.clone()
    base[shard.layout.slice_of(0)] -= shard.action_T[shard.layout.slice_of(0)].float()
    return ReferenceLogprobs(tempered_T=base, unit_T=base)


class World:
    """Four fakes and the log of what they were asked, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.version = -1
        self.records: list[tuple[Any, ...]] = []
        self.initial_reward = 1.0
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.human: list[tuple[Any, ...]] = []
        self.updates = 0
        self.told: list[str] = []
        self.stop_after: int | None = None
        self.alarm_after: int | None = None
        self.stop: Any = self

    async def sample(self, plans: Sequence[SamplePlan]) -> Any:
        self.calls.append(("sample", self.version, [p.index for plan in plans for p in plan.prompts]))
        self.sampled = [ready("rollout h") for _ in plans]
        return [ready(rows(plan, self.version)) for plan in plans], self.sampled

    async def annotate(self, trajectories: Any, hidden: Any, *, omega: float, step: int) -> Any:
        self.calls.append(("annotate", step, [await h for h in hidden], omega))
        shards = [await shard for shard in trajectories]
        return [
            ready(
                annotated(shard, [10.0 * i + n for n in range(shard.layout.rows)], [0.0] * shard.layout.rows)
            )
            for i, shard in enumerate(shards)
        ]

    async def logprobs(self, trajectories: Any) -> Any:
        self.calls.append(("reference",))
        shards = [await shard for shard in trajectories]
        zeros = [torch.zeros(shard.layout.tokens) for shard in shards]
        return [ready(ReferenceLogprobs(tempered_T=z, unit_T=z)) for z in zeros]

    async def update_policy(self, trajectories: Any, advantage: Any, reference: Any, hidden: Any) -> Any:
        self.calls.append(("policy", [a.tolist() for a in advantage]))
        self.updates += 1
        return {"loss": 1.0}, [ready("fresh h") for _ in hidden]

    async def states(self, trajectories: Any) -> Any:
        self.calls.append(("states", [(await shard).prompts for shard in trajectories]))
        return [ready(f"{self.updates} updates h") for _ in trajectories]

    async def warm_up(self, human: Any, *, omega: float) -> Any:
        notes = [await note for note in human.annotation]
        self.calls.append(
            ("warm up", [n.layout.groups for n in notes], [await h for h in human.hidden], omega)
        )
        return {"human_accuracy": 0.5, "bradley_terry_human": 0.7, "nonfinite_steps": 0.0}

    async def update_reward(
        self, hidden: Any, annotation: Any, human: LabelledPairs, *, omega: float, step: int
    ) -> Any:
        self.calls.append(("reward", step, [await h for h in hidden], omega))
        self.human.append(([await h for h in human.hidden], [await note for note in human.annotation]))
        return {"loss": 2.0}

    async def sync(self, *, version: int) -> Any:
        self.calls.append(("sync", version))
        self.version = version
        return {"bytes": 3.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def message(self, text: str) -> None:
        self.told.append(text)

    def rewind(self, step: int) -> None:
        self.rewound = step

    async def step(self, *args: Any) -> None:
        self.records.append(args)

    async def look(self, *args: Any) -> None:
        self.calls.append(("look", args[0]))

    @property
    def requested(self) -> bool:
        return bool(self.records) and self.records[-1][0] == self.stop_after

    def check(self) -> None:
        if self.requested:
            raise Preempted("stopped")

    @property
    def alarmed(self) -> bool:
        return bool(self.records) and self.records[-1][0] == self.alarm_after

    def check_alarms(self) -> None:
        if self.alarmed:
            raise Alarmed("alarm")

    def roles(self) -> Roles:
        return Roles(
            rollout=SimpleNamespace(sample=self.sample),
            policy=SimpleNamespace(update=self.update_policy, hidden=self.states),
            reference=SimpleNamespace(logprobs=self.logprobs),
            reward=SimpleNamespace(annotate=self.annotate, update=self.update_reward, warm_up=self.warm_up),
            sync=self.sync,
            share=ready,
        )


class Stream:
    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> tuple[Prompt, ...]:
        start, self.position = self.position, self.position + n
        return tuple(Prompt(index=i, text=f"p{i}") for i in range(start, start + n))


class Words:
    """A policy's tokenizer: one token for a text, whatever it says."""

    chat_template = None
    eos_token_id = 2
    all_special_ids = (2,)
    bos_token_id = pad_token_id = unk_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[4], special_tokens_mask=[0])


def run(
    config: Config,
    *,
    start: int = 0,
    stop_after: int | None = None,
    alarm_after: int | None = None,
    ends: type[Exception] | None = None,
) -> World:
    world = World()
    world.stop_after, world.alarm_after = stop_after, alarm_after

    async def restore(roles: Roles, prompts: Any) -> int:
        return start

    async def save(step: int, roles: Roles, prompts: Any) -> Path:
        world.saved.append(step)
        return Path()

    async def evaluate(step: int) -> None:
        world.calls.append(("evaluate",))
        world.evaluated.append(step)

    checkpoints: Any = SimpleNamespace(restore=restore, save=save)
    evaluator: Any = SimpleNamespace(evaluate=evaluate)
    stream: Any = Stream()
    record: Any = world
    words: Any = Words()
    roles = world.roles()
    pairs = [PreferencePair(prompt=f"h{i}", chosen="good", rejected="bad") for i in range(PAIRS)]
    human = HumanPairs(config, roles, pairs=pairs, tokenizer=words, record=record)
    with nullcontext() if ends is None else pytest.raises(ends):
        asyncio.run(train(config, roles, stream, human, checkpoints, evaluator, record, world.stop))
    return world


@pytest.fixture
def config() -> Config:
    algo = AlgoConfig(
        steps=3, prompts_per_step=4, prompts_per_shard=2, responses_per_prompt=K, minibatch_prompts=4
    )
    built = Config(algo=algo, reward=RewardConfig(omega_floor=0.6))
    built.evaluate.every = 2
    built.checkpoint.every = 2
    return built


def test_a_step_does_algorithm_1_in_order(config: Config) -> None:
    names = [call[0] for call in run(config).calls if call[0] != "evaluate"]
    step = ["sample", "annotate", "reference", "look", "policy", "reward", "sync"]
    assert names == ["sync", *step, *step, *step]


def test_each_batch_is_sampled_with_the_last_synced_weights(config: Config) -> None:
    world = run(config)
    assert [call[1] for call in world.calls if call[0] == "sync"] == [0, 1, 2, 3]
    assert [call[1] for call in world.calls if call[0] == "sample"] == [0, 1, 2]
    assert [call[2] for call in world.calls if call[0] == "sample"] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_annotation_reads_the_rollout_h_and_the_update_reads_the_refreshed_h(config: Config) -> None:
    world = run(config)
    assert all(call[2] == ["rollout h", "rollout h"] for call in world.calls if call[0] == "annotate")
    assert all(call[2] == ["fresh h", "fresh h"] for call in world.calls if call[0] == "reward")


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


def test_omega_follows_the_cosine_and_serves_annotation_and_update_alike(config: Config) -> None:
    world = run(config)
    expected = [max((math.cos(math.pi * t / 3) + 1) / 2, 0.6) for t in (1, 2, 3)]
    for role in ("annotate", "reward"):
        assert [call[3] for call in world.calls if call[0] == role] == pytest.approx(expected, abs=1e-12)


def test_constant_omega_is_the_floor(config: Config) -> None:
    config.reward.omega_schedule = OmegaSchedule.constant
    assert [omega_at(config, t) for t in (1, 3)] == [0.6, 0.6]


def test_advantages_are_leave_one_out_within_each_group(config: Config) -> None:
    world = run(config)
    policy = next(call for call in world.calls if call[0] == "policy")
    assert policy[1] == [[-1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]]


def test_resume_goes_on_after_the_restored_step_without_evaluating_step_0(config: Config) -> None:
    world = run(config, start=2)
    assert [call[1] for call in world.calls if call[0] == "sync"] == [2, 3]
    assert world.rewound == 2
    assert world.evaluated == [3]
    assert [record[0] for record in world.records] == [3]


def test_evaluations_and_checkpoints_fall_on_their_steps_and_on_the_last(config: Config) -> None:
    world = run(config)
    assert world.evaluated == [0, 2, 3]
    assert world.saved == [2, 3]


def test_told_to_stop_a_run_saves_the_step_it_is_in_and_starts_no_other(config: Config) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    world = run(config, stop_after=2, ends=Preempted)
    assert [record[0] for record in world.records] == [1, 2]
    assert world.saved == [2]


def test_an_alarm_that_ends_the_run_does_so_once_its_step_is_saved(config: Config) -> None:
    config.algo.steps, config.checkpoint.every = 6, 4
    world = run(config, alarm_after=3, ends=Alarmed)
    assert [record[0] for record in world.records] == [1, 2, 3]
    assert world.saved == [3]


def test_an_alarm_in_the_last_step_ends_nothing(config: Config) -> None:
    world = run(config, alarm_after=3)
    assert [record[0] for record in world.records] == [1, 2, 3]
    assert world.saved == [2, 3]


K1_IN_REWARD = AlgoConfig(
    responses_per_prompt=2, kl_place=KLPlace.reward, kl_weight=0.5, kl_estimator=KLEstimator.k1
)
ONE_GROUP = SamplePlan(
    prompts=(Prompt(index=0, text="p"),), group_size=2, step=1, seed=0, temperature=1.0, max_new_tokens=2
)


def test_kl_in_the_reward_is_charged_before_the_advantage() -> None:
    shard = rows(ONE_GROUP, 0)
    records = shard, annotated(shard, [1.0, 3.0], [0.0, 0.0]), reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(Config(algo=K1_IN_REWARD), *([ready(r)] for r in records)))
    expected: Tensor = torch.tensor([-3.0, 3.0])  # Rewards 1 − 0.5·2 = 0 and 3.
    torch.testing.assert_close(advantage, expected)


def test_a_matched_scale_leaves_the_kl_in_the_reward_as_it_is() -> None:
    config = Config(algo=K1_IN_REWARD, reward=RewardConfig(scale=RewardScale.match_frozen))
    shard = rows(ONE_GROUP, 0)
    records = shard, annotated(shard, [0.0, 8.0], [0.0, 2.0]), reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records)))
    assert advantage.tolist() == [-3.0, 3.0]  # Rewards 0 − 0.5·2 and 8/4.


def test_a_matched_scale_multiplies_the_rewards_of_the_whole_step() -> None:
    shards = [rows(ONE_GROUP, 0), rows(ONE_GROUP, 0)]
    # Deviations within groups: own 1 and 3, frozen 0.5 and 0.5, so the factor is 1/4.
    notes = [annotated(shards[0], [1.0, 3.0], [7.0, 8.0]), annotated(shards[1], [4.0, -2.0], [7.0, 8.0])]
    references = [reference_two_nats_away(shard) for shard in shards]
    records = [[ready(record) for record in shard_records] for shard_records in (shards, notes, references)]
    found = {}
    for scale in RewardScale:
        config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=RewardConfig(scale=scale))
        found[scale.value] = torch.cat(asyncio.run(advantages(config, *records))).tolist()
    assert found == {"raw": [-2.0, 2.0, 6.0, -6.0], "match_frozen": [-0.5, 0.5, 1.5, -1.5]}

    metrics = {s: step_metrics(shards, notes, [torch.zeros(2)] * 2, 1.0, scale=s) for s in found}
    assert metrics["match_frozen"].pop("reward/scale_factor") == pytest.approx(0.25, rel=1e-12)
    assert metrics["raw"].pop("reward/scale_factor") == 1.0
    assert metrics["match_frozen"] == metrics["raw"], "what is reported of the rewards is what was annotated"


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        (0.0, RewardScale.raw, [-8.0, 8.0]),
        (1.0, RewardScale.raw, [5.0, -5.0]),
        (1.0, RewardScale.match_frozen, [5.0, -5.0]),
        # 0.75·(0, 8) + 0.25·(5, 0), and with the reward's spread first brought from 4 to 1.
        (0.25, RewardScale.raw, [-4.75, 4.75]),
        (0.25, RewardScale.match_frozen, [-0.25, 0.25]),
    ],
)
def test_gold_is_mixed_with_scaled_rewards_before_the_advantages(
    weight: float, scale: RewardScale, expected: list[float]
) -> None:
    reward = RewardConfig(gold_weight=weight, scale=scale)
    config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=reward)
    shard = rows(ONE_GROUP, 0)
    notes = replace(annotated(shard, [0.0, 8.0], [0.0, 2.0]), gold_N=torch.tensor([5.0, 0.0]))
    records = shard, notes, reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records)))
    assert advantage.tolist() == expected


def test_a_shape_is_of_the_scaled_reward_and_comes_before_gold() -> None:
    reward = RewardConfig(shape=RewardShape.par, scale=RewardScale.match_frozen, gold_weight=0.25)
    config = Config(algo=AlgoConfig(responses_per_prompt=2), reward=reward)
    shard = rows(ONE_GROUP, 0)
    notes = replace(annotated(shard, [0.0, 8.0], [0.0, 2.0]), gold_N=torch.tensor([5.0, 0.0]))
    records = shard, notes, reference_two_nats_away(shard)
    (advantage,) = asyncio.run(advantages(config, *([ready(r)] for r in records), 1.0))
    # Scaled by 1/4, 0 and 2 around 1/4: 0.75·σ(−1/4, 7/4) + 0.25·(5, 0).
    low, high = 0.75 / (1 + math.exp(1 / 4)) + 1.25, 0.75 / (1 + math.exp(-7 / 4))
    assert advantage.tolist() == pytest.approx([low - high, high - low], rel=1e-6)


def test_the_initial_reward_that_shapes_is_the_recorders(config: Config) -> None:
    config.reward.shape = RewardShape.par
    shaped = next(call[1] for call in run(config).calls if call[0] == "policy")
    rewards = [1 / (1 + math.exp(1 - n)) for n in range(K)]
    others = [(sum(rewards) - reward) / (K - 1) for reward in rewards]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert shaped[0][:K] == pytest.approx(expected, rel=1e-5)


def test_shards_cut_the_step_into_whole_groups(config: Config) -> None:
    prompts = [Prompt(index=i, text="") for i in range(5)]
    plans = sample_plans(config, prompts, step=7)
    assert [[p.index for p in plan.prompts] for plan in plans] == [[0, 1], [2, 3], [4]]
    assert {plan.step for plan in plans} == {7}
