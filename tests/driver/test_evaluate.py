"""Evaluation by in-process fakes of the roles: which rows count, which KL is told, and what pairs tell."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Config, EvaluateConfig
from r2m_ray.core.batch import Annotation, ReferenceLogprobs, SamplePlan, pack_rows
from r2m_ray.core.roles import Roles
from r2m_ray.driver.evaluate import Evaluator
from r2m_ray.tasks.data import PreferencePair


class Ready:
    """A reference to a record that is already there."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self.value


class Kept:
    """A recorder that keeps evaluations and knows no gold score."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.found = (step, metrics)

    def gold(self, shards: Sequence[Any]) -> None:
        return


async def sample(plans: Sequence[SamplePlan]) -> Any:
    prompts = [prompt.text for prompt in plans[0].prompts]
    rows = pack_rows(
        prompts, [[5]] * 3, [[6, 2], [2], [7, 8]], ["a", "", "b"],
        logprobs=[[-1.0, -1.0], [-0.5], [-2.0, math.nan]], truncated=[False, False, True], version=0,
    )  # fmt: skip
    return [Ready(rows)], [Ready(None)]


async def annotate(trajectories: Any, hidden: Any, *, omega: float, step: int) -> Any:
    rows = await trajectories[0]
    reward_N = torch.tensor([1.0, math.inf, 3.0])
    return [
        Ready(
            Annotation(
                layout=rows.layout,
                reward_N=reward_N,
                frozen_reward_N=torch.tensor([1.0, 2.0, 6.0]),
                gold_N=torch.full((3,), math.nan),
                rte_ND=torch.zeros(3, 1),
                response_id_N=torch.arange(3),
            )
        )
    ]


async def logprobs(trajectories: Any) -> Any:
    rows = await trajectories[0]
    tempered_T = torch.where(rows.action_T, -1.5, 0.0)
    return [Ready(ReferenceLogprobs(tempered_T=tempered_T, unit_T=10 * tempered_T))]


def test_averages_are_over_what_is_finite_and_kl_is_that_of_the_samples(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    roles: Any = Roles(
        rollout=SimpleNamespace(sample=sample),
        policy=SimpleNamespace(),
        reference=SimpleNamespace(logprobs=logprobs),
        reward=SimpleNamespace(annotate=annotate),
        sync=SimpleNamespace(),
        share=Ready,
    )
    record: Any = Kept()
    evaluator = Evaluator(
        Config(),
        roles,
        prompts=["w1", "w2", "w3"],
        pairs=[],
        counterfactual_pairs={},
        final_omega=0.6,
        tokenizer=tiny_tokenizer,
        record=record,
    )
    metrics = asyncio.run(evaluator.evaluate(7))
    assert record.found == (7, metrics)
    # Row 2 has no KL. The others, against −1.5 a token at the sampling temperature: .5 + .5 and 1.
    assert metrics == pytest.approx(
        {
            "reward": 2.0,
            "reward_nonfinite": 1.0,
            "frozen_reward": 3.0,
            "frozen_gap": -1.5,
            "kl_sequence": 1.0,
            "kl_token": 2 / 3,
            "length": 5 / 3,
            "truncated_fraction": 1 / 3,
        }
    )


REWARDS = {"good": 3.0, "fair": 1.0, "bad": 0.0}
FROZEN = {"good": 0.0, "fair": 1.0, "bad": 2.0}
GOLD = {"good": 2.0, "fair": 1.0, "bad": -1.0}


class World:
    """Roles that read a word of each response, and a recorder that knows its gold."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, **evaluate: int) -> None:
        config = Config()
        config.algo.prompts_per_shard, config.algo.responses_per_prompt = 1, 4
        config.evaluate = EvaluateConfig(**evaluate)
        self.plans: list[SamplePlan] = []
        self.packed: list[list[str]] = []
        self.config, self.tokenizer = config, tokenizer

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        return

    def gold(self, shards: Sequence[Any]) -> list[dict[str, float]]:
        return [{"total": GOLD[text], "right": 1.0} for shard in shards for text in shard.responses]

    async def sample(self, plans: Sequence[SamplePlan]) -> Any:
        self.plans += plans
        words = ["good", "bad", "fair", "good"]
        shards = []
        for plan in plans:
            rows = [words[(prompt.index + j) % 4] for prompt in plan.prompts for j in range(plan.group_size)]
            texts = [prompt.text for prompt in plan.prompts]
            shards.append(Ready(pack_rows(texts, [[5]] * len(texts), [[6, 2]] * len(rows), rows, version=0)))
        return shards, [Ready(None)] * len(shards)

    async def hidden(self, shards: Sequence[Any]) -> Any:
        self.packed += [[*(await shard).responses] for shard in shards]
        return [Ready(None)] * len(shards)

    async def annotate(self, trajectories: Any, hidden: Any, *, omega: float, step: int) -> Any:
        notes = []
        for shard in trajectories:
            rows = await shard
            words = [text.split()[-1] for text in rows.responses]
            notes.append(
                Ready(
                    Annotation(
                        layout=rows.layout,
                        reward_N=torch.tensor([REWARDS[word] for word in words]),
                        frozen_reward_N=torch.tensor([FROZEN[word] for word in words]),
                        gold_N=torch.tensor([GOLD[word] for word in words]),
                        rte_ND=torch.zeros(len(words), 1),
                        response_id_N=torch.arange(len(words)),
                    )
                )
            )
        return notes

    async def logprobs(self, trajectories: Any) -> Any:
        rows = [await shard for shard in trajectories]
        zeros = [torch.zeros(r.layout.tokens) for r in rows]
        return [Ready(ReferenceLogprobs(tempered_T=z, unit_T=z)) for z in zeros]

    def evaluate(
        self,
        prompts: Sequence[str],
        pairs: Sequence[PreferencePair] = (),
        counterfactual_pairs: Mapping[str, Sequence[PreferencePair]] = MappingProxyType({}),
    ) -> dict[str, float]:
        roles: Any = Roles(
            rollout=SimpleNamespace(sample=self.sample),
            policy=SimpleNamespace(hidden=self.hidden),
            reference=SimpleNamespace(logprobs=self.logprobs),
            reward=SimpleNamespace(annotate=self.annotate),
            sync=SimpleNamespace(),
            share=Ready,
        )
        record: Any = self
        evaluator = Evaluator(
            self.config,
            roles,
            prompts=prompts,
            pairs=pairs,
            counterfactual_pairs=counterfactual_pairs,
            final_omega=0.6,
            tokenizer=self.tokenizer,
            record=record,
        )
        return asyncio.run(evaluator.evaluate(1))


WITHIN = {
    "group_std", "group_std_frozen", "scale_ratio", "group_entropy", "group_skew", "pair_flip_rate",
    "gold_correlation", "gold_correlation_frozen", "rm_accuracy_on_policy", "rm_accuracy_on_policy_frozen",
    "pseudo_label_precision",
}  # fmt: skip


def test_single_responses_have_no_measures_within_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    world = World(tiny_tokenizer, prompts=5)
    metrics = world.evaluate([f"w{i}" for i in range(5)])
    assert not WITHIN & set(metrics)
    assert [(len(plan.prompts), plan.group_size) for plan in world.plans] == [(4, 1), (1, 1)]
    # good, bad, fair, good, good
    assert metrics["gold"] == pytest.approx((3 * 2 + 1 - 1) / 5)
    assert metrics["frozen_gap"] == pytest.approx((3 * 3 + 0 - 2) / 5)


def test_several_responses_are_compared_within_their_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    world = World(tiny_tokenizer, prompts=3, responses_per_prompt=3)
    metrics = world.evaluate([f"w{i}" for i in range(3)])
    # A shard has four rows in training, and one whole group here.
    assert [(len(plan.prompts), plan.group_size) for plan in world.plans] == [(1, 3)] * 3
    assert set(metrics) >= WITHIN
    # Groups good bad fair, bad fair good, fair good good: the own order is gold's, the frozen one not.
    assert metrics["rm_accuracy_on_policy"] == metrics["pseudo_label_precision"] == 1.0
    assert metrics["rm_accuracy_on_policy_frozen"] == 0.0
    assert metrics["pair_flip_rate"] == 1.0
    own, frozen = [math.sqrt(14 / 9)] * 2 + [math.sqrt(8 / 9)], [math.sqrt(2 / 3)] * 2 + [math.sqrt(2 / 9)]
    assert metrics["group_std"] == pytest.approx(sum(own) / 3)
    assert metrics["scale_ratio"] == pytest.approx(sum(own) / sum(frozen))
    assert metrics["gold"] == pytest.approx((2 + 2 + 5) / 9)


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt="w1 w2", chosen=f"w3 {chosen}", rejected=f"w3 {rejected}")


def test_pairs_and_their_counterfactual_kinds_are_told_apart(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    world = World(tiny_tokenizer, prompts=1, pairs=3)
    metrics = world.evaluate(
        ["w1"],
        [pair("good", "bad"), pair("fair", "bad"), pair("bad", "fair"), pair("good", "fair")],
        {"style": [pair("fair", "good")] * 2 + [pair("good", "fair")], "value": [pair("good", "bad")] * 2},
    )
    assert metrics["rm_accuracy"] == pytest.approx(2 / 3)  # Three of the four, as ``evaluate.pairs`` says.
    assert metrics["rm_accuracy_frozen"] == pytest.approx(1 / 3)
    assert (metrics["rm_accuracy_style"], metrics["rm_accuracy_value"]) == pytest.approx((1 / 3, 1.0))
    assert metrics["rm_accuracy_style_frozen"] == pytest.approx(2 / 3)
    assert metrics["rm_accuracy_value_frozen"] == 0.0
    # Margins 3, 1 and −1, frozen −2, −1 and 1, in the bins of σ(1), σ(2) and σ(3).
    one, two, three = (1 / (1 + math.exp(-m)) for m in (1, 2, 3))
    assert metrics["calibration_error"] == pytest.approx((1 - three + 2 * abs(0.5 - one)) / 3)
    assert metrics["calibration_error_frozen"] == pytest.approx((two + 2 * abs(0.5 - one)) / 3)
    # Shards of two pairs; the held-out ones come alone, so that their numbers do not depend on the others.
    assert [len(shard) for shard in world.packed] == [4, 2, 4, 4, 2]


def test_a_task_without_counterfactual_pairs_has_no_such_keys(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    world = World(tiny_tokenizer, prompts=1, pairs=2)
    for kinds in ({}, {"style": (), "value": ()}):
        found = world.evaluate(["w1"], [pair("good", "bad")], kinds)
        assert {key for key in found if key.startswith("rm_accuracy")} == {
            "rm_accuracy",
            "rm_accuracy_frozen",
        }
