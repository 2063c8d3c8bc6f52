"""Tiny real models that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import save_model, word_tokenizer
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64 (grouped-query attention, untied head) with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("policy"), num_key_value_heads=1)


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-label Llama reward model with another width and vocabulary than the policy."""
    return save_model(
        tmp_path_factory.mktemp("reward"),
        LlamaForSequenceClassification,
        seed=1,
        tokenizer=word_tokenizer(128),
        width=48,
        heads=4,
        num_labels=1,
    )


@pytest.fixture(scope="session")
def alpaca_eval() -> Path:
    """Real preference files, where the machine has them."""
    directory = SHARED_DATA / "alpaca_eval"
    if not directory.is_dir():
        pytest.skip(f"no preference data at {directory}")
    return directory
