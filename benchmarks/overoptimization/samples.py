"""A world's models, the responses that a policy gives there, their gold, and every layer's states for them.

Axes: N responses, L layers, S tokens of one row, B×T the grid of one forward pass, P width of its model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines.policy.causal import load_causal
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.errors import InputError
from r2m_ray.report.data import Series
from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.note2answer.gold import gold
from r2m_ray.tasks.prepare.measurement import sampled

ROWS_AT_ONCE = 64
"""Rows of one sampling and of one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Responses and the prompt of each, what gold says of them, and which prompt it was, counted from 0."""

    prompts: Sequence[str]
    responses: Sequence[str]
    gold_N: Series
    prompt_N: NDArray[np.int64]


def parser(description: str | None, *, prompts: int, out: str) -> argparse.ArgumentParser:
    """The command line of a measurement of worlds: which ones, how many responses, where its JSON goes."""
    arg = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg.add_argument("overrides", nargs="*", help="the world, as `r2m-ray prepare` takes it")
    arg.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arg.add_argument("--prompts", type=int, default=prompts)
    arg.add_argument("--responses", type=int, default=8, help="to each prompt")
    arg.add_argument("--out", default=out)
    return arg


def load_policy(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A policy in float32 on the processor, and its tokenizer; InputError where it is none."""
    policy = load_causal(
        str(directory),
        field="model.policy",
        dtype=torch.float32,
        attention="sdpa",
        device=torch.device("cpu"),
    )
    return policy.eval(), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def sample(
    config: Config,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    prompts: int,
    responses_per_prompt: int,
) -> Samples:
    """Responses at temperature 1 to prompts of a split of its own; a prompt's responses lie together.

    Draws from torch's global generator, which the caller seeds. InputError for a task without gold, or where
    nothing is asked for.
    """
    if config.task.name is not TaskName.note2answer:
        raise InputError(f"task.name={config.task.name.value}: only note2answer knows gold; leave it so")
    if min(prompts, responses_per_prompt) < 1:
        raise InputError(f"{prompts} prompts and {responses_per_prompt} responses to each: give one at least")
    texts = note2answer.prompts(config.run.seed, split, prompts, config.task.values_per_attribute)
    asked = [text for text in texts for _ in range(responses_per_prompt)]
    responses: list[str] = []
    scores: list[float] = []
    for start in range(0, len(asked), ROWS_AT_ONCE):
        part = asked[start : start + ROWS_AT_ONCE]
        answers, cut = sampled(policy, tokenizer, part, max_new_tokens=config.task.max_new_tokens)
        responses += answers
        scores += [gold(*row).total for row in zip(part, answers, cut, strict=True)]
    return Samples(
        prompts=asked,
        responses=responses,
        gold_N=np.array(scores),
        prompt_N=np.repeat(np.arange(prompts), responses_per_prompt),
    )


def policy_rows(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> tuple[list[list[int]], list[int]]:
    """Of each response the policy's input tokens, and the first place whose state predicts the response.

    The last place predicts the end token, which is no input.
    """
    rows, firsts = [], []
    for prompt, response in zip(samples.prompts, samples.responses, strict=True):
        start = policy_prompt_ids(tokenizer, prompt)
        rows.append([*start, *policy_response_ids(tokenizer, response)[:-1]])
        firsts.append(len(start) - 1)
    return rows, firsts


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Of each row of token ids the states of all layers, [L, S, P], one row after the other.

    The first layer is the embeddings, the last one is after the final norm. For causal models, which need no
    mask where the padding comes last.
    """
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        length = max(map(len, part))
        input_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in part])
        output = model.base_model(input_ids=input_BT, use_cache=False, output_hidden_states=True)
        layers_LBTP = torch.stack(output.hidden_states)
        for place, row in enumerate(part):
            yield layers_LBTP[:, place, : len(row)]
