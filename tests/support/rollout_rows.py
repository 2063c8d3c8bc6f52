"""A plan to sample, and transformers' own reading of the rows that were sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r2m_ray.core.batch import Prompt, SamplePlan, Trajectories

STOP_TOKENS = [2, 9]


def sample_plan(**changes: Any) -> SamplePlan:
    """6 prompts of 3 to 63 words in 4 rows each, at temperature 0.7."""
    prompts = tuple(
        Prompt(index=i, text=" ".join(f"w{(7 * i + j) % 150}" for j in range(3 + 12 * i))) for i in range(6)
    )
    settings = {"group_size": 4, "step": 1, "seed": 3, "temperature": 0.7, "max_new_tokens": 20}
    return SamplePlan(**({"prompts": prompts} | settings | changes))


def readings(model: PreTrainedModel, rows: Trajectories) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Where each row lies, its last hidden states [S−1, P] and its logits [S−1, V], row by row."""
    for n in range(rows.layout.rows):
        where = rows.layout.slice_of(n)
        with torch.no_grad():
            hidden = model.get_decoder()(rows.input_T[where][None]).last_hidden_state[0]
            yield where, hidden, model.get_output_embeddings()(hidden)


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model after a large step in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
