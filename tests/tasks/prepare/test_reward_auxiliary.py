"""A trunk learns to count: the mean square error of standardised counts, its score layer untouched."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from r2m_ray.engines.text import conversation_ids
from r2m_ray.tasks.prepare.reward_auxiliary import learn_counts, standardised
from r2m_ray.tasks.prepare.training import Training

CONVERSATIONS = [("w1 w2", "w3 w4 w5"), ("w7", "w8 w3"), ("w2 w9", "w10 w3 w3 w11")]
COUNTS = [[3.0, 1.0, 7.0], [2.0, 1.0, 7.0], [4.0, 2.0, 7.0]]


def plan(steps: int, batch: int, learning_rate: float = 1e-3) -> Training:
    return Training(steps=steps, batch=batch, learning_rate=learning_rate, seed=0)


@pytest.fixture
def reward(tiny_reward_dir: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)


def test_counts_are_standardised_and_a_constant_one_is_zero() -> None:
    target = standardised(torch.tensor(COUNTS))
    third = math.sqrt(1.5)
    expected = [[0.0, -third / math.sqrt(3), 0.0], [-third, -third / math.sqrt(3), 0.0]]
    torch.testing.assert_close(target[:2], torch.tensor(expected))
    torch.testing.assert_close(target.square().mean(0), torch.tensor([1.0, 1.0, 0.0]))


def test_the_loss_is_the_mean_square_error_at_the_last_token(
    reward: PreTrainedModel, tiny_reward_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    torch.manual_seed(5)
    # The layer that counts is drawn as a whole model of the same shape is.
    config = type(reward.config).from_pretrained(tiny_reward_dir, num_labels=3)
    weight = type(reward)(config).score.weight
    states = [
        reward.base_model(torch.tensor([conversation_ids(tokenizer, *row)])).last_hidden_state[0, -1]
        for row in CONVERSATIONS
    ]
    expected = (torch.stack(states) @ weight.T - standardised(torch.tensor(COUNTS))).square().mean()
    torch.manual_seed(5)
    trained = learn_counts(reward, tokenizer, CONVERSATIONS, COUNTS, plan(steps=1, batch=3))
    assert trained.losses == ((1, pytest.approx(expected.item(), rel=1e-5)),)


def test_the_trunk_learns_and_the_score_layer_stays(reward: PreTrainedModel, tiny_reward_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    random = Random(0)
    texts = [
        ("w1", " ".join(f"w{random.randint(2, 9)}" for _ in range(random.randint(1, 8)))) for _ in range(96)
    ]
    counts = [[float(len(text.split()))] for _, text in texts]
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    trained = learn_counts(reward, tokenizer, texts, counts, plan(steps=120, batch=16, learning_rate=2e-3))
    assert trained.losses[-1][1] < 0.2 < 1.0 < trained.losses[0][1]
    after = reward.state_dict()
    assert torch.equal(after["score.weight"], before["score.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert reward.config.num_labels == 1


def test_zero_steps_change_nothing_and_draw_nothing(reward: PreTrainedModel, tiny_reward_dir: Path) -> None:
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    state = torch.random.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    assert learn_counts(reward, tokenizer, CONVERSATIONS, COUNTS, plan(steps=0, batch=2)).losses == ()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reward.state_dict().items())
