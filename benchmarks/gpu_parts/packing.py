"""The learner's packed rows against each row alone: log-probs and hidden states, and seconds of a pass.

With flash attention rows lie end to end in one line and must not read one another. Without a GPU the learner
lays rows out in grids; the comparison is the same.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import measure
import torch
from gpu_parts import setup
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from r2m_ray.core.batch import Trajectories, pack_rows
from r2m_ray.engines.policy.blocks import Block, Rows
from r2m_ray.engines.policy.causal import CausalScorer, label_logprobs, load_causal

FLASH = "flash_attention_2"


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Errors of packed log-probs and states beside those of rows read alone, and the time of both."""
    on_gpu = setup.device().type != "cpu"
    if on_gpu and not is_flash_attn_2_available():
        raise setup.Absent("the package flash_attn is not installed: pip install flash-attn")
    attention = FLASH if on_gpu else "sdpa"
    policy, dtype = setup.policy_dir(scratch, sizes), getattr(torch, sizes.dtype)
    rows = random_rows(sizes)
    model = load_causal(
        str(policy), field="model.policy", dtype=dtype, attention=attention, device=setup.device()
    )
    budget = 4 * sizes.max_model_len
    scorer = CausalScorer(model.eval(), attention=attention, temperature=1.0, token_budget=budget)
    laid = scorer.blocks(Rows.of([rows]))
    alone = setup.exact_model(policy, dtype)
    logp_T, state_TP = packed(scorer, laid, rows)
    same = one_by_one(alone, rows)
    times = measure.alternating(
        {"packed": lambda: packed(scorer, laid, rows), "one_by_one": lambda: one_by_one(alone, rows)},
        sizes.repeats,
    )
    exact = one_by_one(alone.to(setup.NEXT_DTYPE[sizes.dtype]), rows)
    actions = rows.action_T
    errors = {
        "logprobs": setup.compared_errors(logp_T[actions], same[0][actions], exact[0][actions]),
        "states": setup.compared_errors(state_TP, same[1], exact[1]),
    }
    return {
        "passed": all(error["within_rounding"] for error in errors.values()),
        "attention": attention,
        "layout": "lines" if attention == FLASH else "grids",
        "rows": rows.layout.rows,
        "tokens": rows.layout.tokens,
        "passes": len(laid),
        "errors": errors,
        "seconds": {name: measure.summary(values) for name, values in times.items()},
    }


def random_rows(sizes: setup.Sizes) -> Trajectories:
    """Rows of many lengths, from one response token to all that fit."""
    draw = random.Random(2)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(len(setup.SPECIALS), sizes.vocabulary) for _ in range(count)]

    prompts = [tokens(draw.randint(2, sizes.prompt_words)) for _ in range(sizes.prompts)]
    responses = [tokens(draw.randint(1, sizes.new_tokens)) for _ in range(sizes.prompts * sizes.group_size)]
    texts = [""] * len(prompts), [""] * len(responses)
    return pack_rows(texts[0], prompts, responses, texts[1], version=0)


@torch.no_grad()
def packed(scorer: CausalScorer, laid: list[Block], rows: Trajectories) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens, float32 [T], and states [T, P], as the learner computes them."""
    device = setup.device()
    logp_T = torch.zeros(rows.layout.tokens, device=device)
    state_TP = torch.zeros(rows.layout.tokens, scorer.width, dtype=scorer.model.dtype, device=device)
    for block in laid:
        state_SP, _, unit_A = scorer(block.input_BL, block.position_BL, block.pick_A, block.label_A)
        logp_T[block.action_A] = unit_A
        state_TP[block.token_T] = state_SP[block.slot_T]
    return logp_T.cpu(), state_TP.cpu()


@torch.no_grad()
def one_by_one(model: PreTrainedModel, rows: Trajectories) -> tuple[Tensor, Tensor]:
    """The same from one pass for each row."""
    logps, states = [], []
    for n in range(rows.layout.rows):
        where = rows.layout.slice_of(n)
        input_T, label_T = (tensor[where].to(model.device) for tensor in (rows.input_T, rows.label_T))
        state_TP = model.get_decoder()(input_T[None], use_cache=False).last_hidden_state[0]
        logps.append(label_logprobs(model.get_output_embeddings()(state_TP), label_T, 1.0)[1].cpu())
        states.append(state_TP.cpu())
    return torch.cat(logps), torch.cat(states)
