"""Models of the transformers library, loaded from safetensors alone and without running their code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from r2m_ray.errors import InputError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


def load_pretrained(
    architecture: Any,
    model_dir: str,
    *,
    field: str,
    kind: str,
    dtype: torch.dtype,
    attention: str,
    prepare: Callable[[PretrainedConfig], None],
) -> PreTrainedModel:
    """Load a model of one of transformers' auto classes; `prepare` checks and changes its configuration.

    Raises InputError, by the name "model.policy=DIRECTORY", where it cannot be loaded or is no such kind.
    """
    name = f"{field}={model_dir}"
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        prepare(config)
        model, report = architecture.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except LOADING_ERRORS as error:
        raise InputError(f"{name} cannot be loaded as a {kind}: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise InputError(f"{name}: its weight files lack {missing}; they are not a {kind}'s")
    loaded: PreTrainedModel = model
    return loaded
