"""Tiny real models: random weights, words as tokens, nothing downloaded. One factory for all tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def word_tokenizer(words: int = 160) -> PreTrainedTokenizerFast:
    """<pad> <bos> <eos> <unk> w0 w1 …, `words` in all, split at white space."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(words - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_model(
    directory: Path,
    kind: type[PreTrainedModel] = LlamaForCausalLM,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    width: int = 64,
    layers: int = 2,
    heads: int = 2,
    **fields: object,
) -> Path:
    """Save a random float32 model of this class with its tokenizer, and return the directory.

    heads: 2 of width 32 by default, since vLLM's CPU attention takes head sizes from 32. fields: more of the
    class's configuration.
    """
    words = tokenizer or word_tokenizer()
    settings = {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    kind(kind.config_class(**(settings | fields))).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
