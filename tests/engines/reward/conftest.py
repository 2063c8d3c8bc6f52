"""Reward engines on the tiny reward model, and one shard of text with hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reward_rows import P, states
from transformers import PreTrainedTokenizerFast

from r2m_ray.config.schema import Config, FeedbackConfig, RewardConfig, RunConfig
from r2m_ray.core.batch import Hidden, Trajectories, pack_rows
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.tasks.task import GoldScorer

PROMPTS = ("w1 w2 w3", "w4 w5 w6 w7 w8 w9")
RESPONSES = ("w20 w21", "w22", "w20 w21", "w23 w24 w25", "w140", "w141", "w26 w27 w28 w29", "w30 w31")


@pytest.fixture
def make_engine(tiny_reward_dir: Path) -> Callable[..., RewardEngine]:
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
    return states(trajectories.layout)
