"""Evaluation by in-process fakes of the roles: which rows count, and which KL is reported."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from r2m_ray.batch import Annotation, ReferenceLogprobs, pack_rows
from r2m_ray.config import Config
from r2m_ray.evaluate import Evaluator
from r2m_ray.roles import Roles, SamplePlan


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
            "kl_sequence": 1.0,
            "kl_token": 2 / 3,
            "length": 5 / 3,
            "truncated_fraction": 1 / 3,
        }
    )
