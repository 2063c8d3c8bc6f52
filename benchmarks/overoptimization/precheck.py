"""The information pre-check of a prepared world: what H_last and h explain of gold in its policy's responses.

    python -m benchmarks.overoptimization.precheck experiment=overoptimization --seeds 0 1 2 --out found.json

Axes: N responses, P policy width, D reward width, B×L the grid of one forward pass, Q queries, F features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import write
from r2m_ray.analysis.precheck import Information, information
from r2m_ray.compose import load_config
from r2m_ray.config import Config
from r2m_ray.models.causal import load_causal
from r2m_ray.models.reward_trunk import RewardTrunk
from r2m_ray.models.text import policy_prompt_ids, policy_response_ids
from r2m_ray.stages.measurement import sampled, seeded
from r2m_ray.stages.prepare import Prepared, prepare
from r2m_ray.tasks import note2answer
from r2m_ray.tasks.note2answer_gold import gold

PROMPTS_AT_ONCE = 64
"""Prompts of one sampling and of one forward pass."""
QUERIES = 4
"""Random queries that pool h by attention, the same ones for every response of a seed."""
SHARPNESS = 2.0
"""Standard deviation of an attention's logits over states of norm √P, about: each query picks some states."""


def precheck(config: Config, prepared: Prepared, prompts: int, responses_per_prompt: int) -> Information:
    """Sample from the prepared policy and ask what H_last, h and both together explain of gold.

    The prompts belong to a split of their own. Everything is drawn from ``config.run.seed``.
    """
    cpu = torch.device("cpu")
    policy = load_causal(
        str(prepared.policy_dir), field="model.policy", dtype=torch.float32, attention="sdpa", device=cpu
    )
    tokenizer = AutoTokenizer.from_pretrained(prepared.policy_dir)
    texts = note2answer.prompts(config.run.seed, "precheck", prompts, config.task.values_per_attribute)
    asked = [text for text in texts for _ in range(responses_per_prompt)]
    responses, features, scores = [], [], []
    with torch.no_grad(), seeded(config.run.seed):
        query_QP = torch.randn(QUERIES, policy.config.hidden_size)
        for start in range(0, len(asked), PROMPTS_AT_ONCE):
            part = asked[start : start + PROMPTS_AT_ONCE]
            answers, cut = sampled(policy, tokenizer, part, max_new_tokens=config.task.max_new_tokens)
            features.append(pooled(policy, tokenizer, part, answers, query_QP))
            scores += [gold(*row).total for row in zip(part, answers, cut, strict=True)]
            responses += answers
    trunk = RewardTrunk(
        model_dir=str(prepared.reward_dir),
        dtype=torch.float32,
        attention=config.model.attention,
        score_layer=config.model.score_layer,
        max_length=config.reward.max_length,
        tokens_per_microbatch=config.reward.tokens_per_microbatch,
        device=cpu,
    )
    rte_ND, _ = trunk.read(asked, responses)
    return information(
        rte_ND.double().numpy(),
        torch.cat(features).double().numpy(),
        np.array(scores),
        np.repeat(np.arange(prompts), responses_per_prompt),
        seed=config.run.seed,
    )


def pooled(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    query_QP: Tensor,
) -> Tensor:
    """h of each row in one vector, [N, F]: its mean, its maximum, and its mean under each query's attention.

    h is the last layer after the final norm, at input tokens only. Each pooling is taken over the states that
    predict the response, and over the whole row.
    """
    rows = [
        (policy_prompt_ids(tokenizer, prompt), policy_response_ids(tokenizer, response)[:-1])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    length = max(len(start) + len(end) for start, end in rows)
    input_BL = torch.tensor([[*start, *end, *[0] * (length - len(start) - len(end))] for start, end in rows])
    hidden_BLP = policy.base_model(input_ids=input_BL, use_cache=False).last_hidden_state
    features = []
    for (start, end), hidden_LP in zip(rows, hidden_BLP, strict=True):
        row_SP = hidden_LP[: len(start) + len(end)]
        features.append(torch.cat([_pooled(row_SP[len(start) - 1 :], query_QP), _pooled(row_SP, query_QP)]))
    return torch.stack(features)


def _pooled(hidden_SP: Tensor, query_QP: Tensor) -> Tensor:
    weight_QS = torch.softmax(SHARPNESS * query_QP @ hidden_SP.T / hidden_SP.shape[1] ** 0.5, -1)
    return torch.cat([hidden_SP.mean(0), hidden_SP.amax(0), (weight_QS @ hidden_SP).flatten()])


def main() -> None:
    """Prepare each seed's world where it is not there yet, and print and write its pre-check."""
    arg = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg.add_argument("overrides", nargs="*", help="the world, as `r2m-ray prepare` takes it")
    arg.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arg.add_argument("--prompts", type=int, default=512)
    arg.add_argument("--responses", type=int, default=8)
    arg.add_argument("--out", default="precheck.json")
    parsed = arg.parse_args()
    found = {}
    for seed in parsed.seeds:
        config = load_config([*parsed.overrides, f"run.seed={seed}"])
        one = precheck(config, prepare(config), parsed.prompts, parsed.responses)
        found[seed] = {**asdict(one), "gains": one.gains}
        print(f"seed {seed}: {found[seed]}", flush=True)
    write(parsed.out, {"overrides": parsed.overrides, "seeds": found})


if __name__ == "__main__":
    main()
