"""Facts that a policy's Hugging Face directory states without its weights being loaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from r2m_ray.errors import InputError


def stop_token_ids(model_dir: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of every end token: the tokenizer's, and all that the generation config names.

    Raises InputError where neither names one: no response could ever end.
    """
    configured = GenerationConfig.from_pretrained(model_dir).eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if not ids:
        raise InputError(
            f"model.policy {model_dir}: neither its tokenizer nor its generation config names an end token; "
            "set eos_token_id in one of them"
        )
    return tuple(sorted(ids))


def parameter_shapes(model_dir: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the causal language model; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
