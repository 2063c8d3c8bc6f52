"""Reward engines on the tiny reward model, and shards for them.

Axes as in the package: G groups, K rows per group, N rows, T packed tokens, P policy width, D reward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Config, FeedbackConfig, RewardConfig, RunConfig
from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch, Trajectories, pack_rows
from r2m_ray.core.head import R2MHead
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.tasks.task import GoldScorer

P, D, K = 64, 48, 4
PROMPTS = ("w1 w2 w3", "w4 w5 w6 w7 w8 w9")
RESPONSES = ("w20 w21", "w22", "w20 w21", "w23 w24 w25", "w140", "w141", "w26 w27 w28 w29", "w30 w31")
EngineFactory = Callable[..., RewardEngine]


@pytest.fixture
def make_engine(tiny_reward_dir: Path) -> EngineFactory:
    """Engines on the tiny reward model; keywords are fields of ``reward``, `noise` of ``feedback``, `seed` of
    ``run``; `gold` scores rows."""

    def make(
        *, noise: float = 0.0, seed: int = 0, gold: GoldScorer | None = None, **fields: object
    ) -> RewardEngine:
        defaults = {"attention_width": 16, "init_std": 0.2, "learning_rate": 1e-2, "max_length": 256}
        config = Config(
            run=RunConfig(seed=seed),
            reward=RewardConfig(**{**defaults, **fields}),  # type: ignore[arg-type]
            feedback=FeedbackConfig(noise=noise),
        )
        return RewardEngine(
            config=config,
            model_dir=str(tiny_reward_dir),
            policy_width=P,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            gold=gold,
        )

    return make


@pytest.fixture(scope="module")
def trajectories(tiny_tokenizer: PreTrainedTokenizerFast) -> Trajectories:
    return pack_rows(
        PROMPTS,
        [policy_prompt_ids(tiny_tokenizer, text) for text in PROMPTS],
        [policy_response_ids(tiny_tokenizer, text) for text in RESPONSES],
        RESPONSES,
        version=0,
    )


@pytest.fixture(scope="module")
def hidden(trajectories: Trajectories) -> Hidden:
    return states(trajectories.layout, seed=0)


def states(layout: Layout, *, seed: int, width: int = P) -> Hidden:
    values = torch.randn(layout.tokens, width, generator=torch.Generator().manual_seed(seed))
    return Hidden(layout=layout, hidden_TP=values)


def random_batch(seed: int, *, groups: int = 2, size: int = K, width: int = P) -> RewardBatch:
    """A shard with made-up embeddings and rewards, rows of 1 … 12 tokens, all responses distinct."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    lengths = torch.randint(1, 13, (rows,), generator=generator).tolist()
    layout = Layout.from_lengths(lengths, size)
    annotation = Annotation(
        layout=layout,
        reward_N=torch.randn(rows, generator=generator),
        frozen_reward_N=torch.randn(rows, generator=generator),
        rte_ND=torch.randn(rows, D, generator=generator),
        gold_N=torch.randn(rows, generator=generator),
        response_id_N=torch.arange(rows),
    )
    return RewardBatch(hidden=states(layout, seed=seed, width=width), annotation=annotation)


def equation_3_and_4(head: R2MHead, rte_ND: Tensor, hidden: Hidden, omega: float) -> Tensor:
    """The reward in float64 with keys and values formed as the paper writes them."""
    w = {name: value.detach().double() for name, value in head.named_parameters()}
    rewards = []
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)].double()
        last = rte_ND[n].double()
        scores = (last @ w["w_q"]) @ (h @ w["w_k"]).T / math.sqrt(w["w_q"].shape[1])
        feedback = torch.softmax(scores, 0) @ (h @ w["w_v"]) @ w["w_o"]
        rewards.append(((1 - omega) * feedback + omega * last) @ w["score_weight"])
    return torch.stack(rewards)


@pytest.fixture(scope="session")
def make_states() -> Callable[..., Hidden]:
    return states


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., RewardBatch]:
    return random_batch


@pytest.fixture(scope="session")
def literal_rewards() -> Callable[[R2MHead, Tensor, Hidden, float], Tensor]:
    return equation_3_and_4
