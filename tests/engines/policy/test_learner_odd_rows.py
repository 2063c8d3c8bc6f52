"""Rows at the edges: the end token first, one token, no end at all, equal rewards, a spike in the reward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from learner_rows import assert_equal, learner, learner_config, weights
from torch import Tensor

from r2m_ray.config.schema import Ratio
from r2m_ray.core.advantages import ADVANTAGES
from r2m_ray.core.batch import PolicyBatch, ReferenceLogprobs, pack_rows

pytestmark = pytest.mark.usefixtures("one_rank")

END = 2
# The end token alone, one word cut off, a whole answer, and eight words without an end.
RESPONSES = ([END], [40], [41, 42, END], list(range(50, 58)))


def odd_batch(reward_N: Tensor, advantage: str = "rloo") -> PolicyBatch:
    """Two prompts, of one and of five tokens, with the four odd responses each."""
    rows = pack_rows(
        ["p", "q"],
        [[7], [8, 9, 10, 11, 12]],
        [*RESPONSES, *RESPONSES],
        [f"r{n}" for n in range(8)],
        logprobs=[[-1.0] * len(r) for r in (*RESPONSES, *RESPONSES)],
        truncated=[r[-1] != END for r in (*RESPONSES, *RESPONSES)],
        version=0,
    )
    zeros_T = torch.zeros(rows.layout.tokens)
    return PolicyBatch(
        trajectories=rows,
        advantage_N=ADVANTAGES[advantage](reward_N, 4),
        reference=ReferenceLogprobs(tempered_T=zeros_T, unit_T=zeros_T),
    )


def test_the_mask_holds_every_response_token_and_no_prompt_token() -> None:
    rows = odd_batch(torch.zeros(8)).trajectories
    for n, response in enumerate((*RESPONSES, *RESPONSES)):
        part = rows.layout.slice_of(n)
        assert rows.label_T[part][rows.action_T[part]].tolist() == response
        prompt = 1 if n < 4 else 5
        assert rows.action_T[part].tolist() == [False] * (prompt - 1) + [True] * len(response)
    assert rows.response_lengths.tolist() == [1, 1, 3, 8] * 2
    # A prompt of one token and its end token: the only input is the prompt, its only label the end.
    assert (rows.input_T[0].item(), rows.label_T[0].item()) == (7, END)


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo", "reinforce_pp"])
def test_odd_rows_and_a_reward_spike_give_one_finite_bounded_update(
    advantage: str, ratio: Ratio, tiny_policy_dir: Path
) -> None:
    config = learner_config(0)
    config.algo.epochs, config.algo.ratio = 1, ratio
    reward_N = torch.tensor([0.0, 1.0, -1.0, 0.5, 1e12, 0.0, 1.0, 0.0])
    policy = learner(config, tiny_policy_dir)
    before = weights(policy)
    stats, hidden = policy.update([odd_batch(reward_N, advantage)], (0,))
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (1, 0)
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["tokens"] == 26
    assert torch.isfinite(hidden[0].hidden_TP).all()
    # Adam's step, with its gradient clipped, is at most the learning rate of 1e-3.
    moved = max(float((after - before[name]).abs().max()) for name, after in weights(policy).items())
    assert 0 < moved <= 1.001e-3


@pytest.mark.parametrize("advantage", list(ADVANTAGES))
def test_equal_rewards_move_nothing(advantage: str, tiny_policy_dir: Path) -> None:
    config = learner_config(0)
    config.algo.kl_weight = 0.0
    policy = learner(config, tiny_policy_dir)
    before = weights(policy)
    batch = odd_batch(torch.full((8,), 1e4 / 7), advantage)
    assert batch.advantage_N.tolist() == [0.0] * 8
    stats, _ = policy.update([batch], (0,))
    assert (stats["loss"], stats["grad_norm"]) == (0, 0)
    assert_equal(weights(policy), before)
