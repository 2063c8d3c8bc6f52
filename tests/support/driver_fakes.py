"""In-process fakes of the roles, and a run of the driver against them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r2m_ray.config.schema import AlgoConfig, Config, RewardConfig
from r2m_ray.core.batch import Annotation, Prompt, ReferenceLogprobs, SamplePlan, Trajectories, pack_rows
from r2m_ray.core.roles import LabelledPairs, Roles
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.loop import train
from r2m_ray.errors import Alarmed, Preempted
from r2m_ray.tasks.data import PreferencePair

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


def small_config() -> Config:
    """Three steps of two shards of two prompts; every second one is evaluated and saved."""
    algo = AlgoConfig(
        steps=3, prompts_per_step=4, prompts_per_shard=2, responses_per_prompt=K, minibatch_prompts=4
    )
    built = Config(algo=algo, reward=RewardConfig(omega_floor=0.6))
    built.evaluate.every = 2
    built.checkpoint.every = 2
    return built
