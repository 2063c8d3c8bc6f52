"""The export of hidden states: exact against transformers, and its cost against vLLM by itself.

On a GPU vLLM runs as its users run it: with CUDA graphs, asynchronous scheduling and its second model runner.
The policy's bfloat16 states are compared with transformers in float32, and may be as far from it as
transformers in bfloat16 is, times `setup.ALLOWED_ERROR`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import export as benchmark
import torch
from gpu_parts import setup
from safetensors.torch import load_file
from torch import Tensor


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Throughput of the export, of the engine without it, and of raw vLLM; errors of the exported states."""
    policy, states = setup.policy_dir(scratch, sizes), scratch / "states.safetensors"
    arguments = argparse.Namespace(
        rows=sizes.prompts * sizes.group_size,
        group=sizes.group_size,
        prompt_tokens=sizes.prompt_words,
        new_tokens=sizes.new_tokens,
        dtype=sizes.dtype,
        engine_args=json.dumps(setup.engine_args(sizes)),
        repeats=sizes.repeats,
    )
    sides = (*benchmark.SIDES, benchmark.RAW)
    found = benchmark.compared(str(policy), arguments, sides, states=str(states))
    exactness = compared_states(policy, sizes, load_file(states))
    return {"passed": exactness["within_rounding"], **found, "exactness": exactness}


def compared_states(policy: Path, sizes: setup.Sizes, saved: dict[str, Tensor]) -> dict[str, Any]:
    """Errors of exported states, which `saved` holds with their input tokens and offsets."""
    own = getattr(torch, sizes.dtype)
    same_TP, exact_TP = (
        transformers_states(policy, dtype, saved["input_T"], saved["offsets"])
        for dtype in (own, setup.NEXT_DTYPE[sizes.dtype])
    )
    return setup.compared_errors(saved["hidden_TP"], same_TP, exact_TP)


@torch.no_grad()
def transformers_states(policy: Path, dtype: torch.dtype, input_T: Tensor, offsets: Tensor) -> Tensor:
    """The last hidden states [T, P] of every row, each read alone."""
    model = setup.exact_model(policy, dtype)
    rows = input_T.to(model.device).tensor_split(offsets[1:-1])
    return torch.cat([model.get_decoder()(row[None]).last_hidden_state[0].cpu() for row in rows])
