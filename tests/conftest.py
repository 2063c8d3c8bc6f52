"""Tiny real models that every test may use: random weights, a word-level tokenizer, nothing downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {
        word: i for i, word in enumerate(specials + [f"w{i}" for i in range(words - len(specials))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """160 words: <pad> <bos> <eos> <unk> w0 … w155, split on white space."""
    return word_tokenizer(160)


@pytest.fixture(scope="session")
def tiny_policy_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A Llama of width 64 (grouped-query attention, untied head) with its tokenizer, fp32, seed 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's CPU attention takes head sizes from 32.
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    directory = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-label Llama reward model with another width and vocabulary than the policy, fp32, seed 1."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
        initializer_range=0.3,
    )
    directory = tmp_path_factory.mktemp("reward")
    LlamaForSequenceClassification(config).save_pretrained(directory)
    word_tokenizer(128).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def alpaca_eval() -> Path:
    """Real preference files, where the machine has them."""
    directory = SHARED_DATA / "alpaca_eval"
    if not directory.is_dir():
        pytest.skip(f"no preference data at {directory}")
    return directory
