"""Training minimises the formula's loss, on rows in a good order, and changes nothing at 0 steps."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from r2m_ray.engines.text import conversation_ids, policy_prompt_ids, policy_response_ids
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.prepare.trainers import Training, fine_tune, fit_preferences, training_order

DEMONSTRATIONS = [("w1 w2 w3", "w4 w5"), ("w6", "w7 w8 w9 w10"), ("w11 w12", "w13")]
PAIRS = [
    PreferencePair(prompt="w1 w2", chosen="w3 w4 w5", rejected="w6"),
    PreferencePair(prompt="w7", chosen="w8", rejected="w9 w10"),
]


def plan(steps: int, batch: int, learning_rate: float = 1e-3) -> Training:
    return Training(steps=steps, batch=batch, learning_rate=learning_rate, seed=0)


@pytest.fixture
def policy(tiny_policy_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_policy_dir)


@pytest.fixture
def reward(tiny_reward_dir: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fine_tuning_minimises_the_mean_loss_of_response_tokens(
    policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    losses = []
    for prompt, response in DEMONSTRATIONS:
        start, end = policy_prompt_ids(tiny_tokenizer, prompt), policy_response_ids(tiny_tokenizer, response)
        logits = policy(torch.tensor([start + end]), use_cache=False).logits[0, len(start) - 1 : -1]
        losses += (-logits.log_softmax(-1)[range(len(end)), end]).tolist()
    trained = fine_tune(policy, tiny_tokenizer, DEMONSTRATIONS, plan(steps=1, batch=3))
    assert trained.losses == ((1, pytest.approx(sum(losses) / len(losses), rel=1e-5)),)


def test_a_reward_model_minimises_bradley_terry(reward: PreTrainedModel, tiny_reward_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)

    def score(prompt: str, response: str) -> torch.Tensor:
        return reward(torch.tensor([conversation_ids(tokenizer, prompt, response)])).logits[0, 0]

    margins = torch.stack([score(p.prompt, p.chosen) - score(p.prompt, p.rejected) for p in PAIRS])
    expected = -logsigmoid(margins).mean().item()
    trained = fit_preferences(reward, tokenizer, PAIRS, plan(steps=1, batch=2))
    assert trained.losses == ((1, pytest.approx(expected, rel=1e-5)),)


def test_zero_steps_leave_both_models_as_they_are(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_reward_dir: Path,
) -> None:
    before = weights(policy), weights(reward)
    nothing = plan(steps=0, batch=2)
    assert fine_tune(policy, tiny_tokenizer, DEMONSTRATIONS, nothing).losses == ()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    assert fit_preferences(reward, tokenizer, PAIRS, nothing).losses == ()
    for model, old in zip((policy, reward), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("rows", "steps", "batch"), [(96, 12, 8), (7, 5, 4), (3, 2, 8), (50, 3, 4)])
def test_rows_are_used_evenly(rows: int, steps: int, batch: int) -> None:
    uses = Counter(training_order(list(range(rows)), plan(steps, batch)))
    assert sum(uses.values()) == steps * batch
    counts = [uses[row] for row in range(rows)]
    assert max(counts) - min(counts) <= 1


def test_batches_hold_rows_of_like_length_in_random_order() -> None:
    lengths = [(row * 37) % 60 for row in range(400)]
    order = training_order(lengths, plan(steps=50, batch=8))
    batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, 400, 8)]
    # 400 sorted rows cover 60 lengths, so 8 neighbours differ by at most 2.
    assert max(max(batch) - min(batch) for batch in batches) <= 2
    means = [sum(batch) / 8 for batch in batches]
    descents = sum(a > b for a, b in pairwise(means))
    assert 15 <= descents <= 34
    assert order != training_order(lengths, Training(steps=50, batch=8, learning_rate=0.0, seed=1))
