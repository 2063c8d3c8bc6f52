"""The information pre-check of a prepared world: what H_last and h explain of gold in its policy's responses.

    python -m benchmarks.overoptimization.precheck experiment=overoptimization lab.reward_auxiliary_steps=600

Axes: N responses, L layers, S tokens of one row, P policy width, D reward width, Q queries, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import write
from benchmarks.overoptimization.information import Information, information
from benchmarks.overoptimization.samples import (
    Samples,
    hidden_states,
    load_policy,
    parser,
    policy_rows,
    sample,
)
from benchmarks.overoptimization.worlds import prepare, recipe
from r2m_ray.config.schema import Config
from r2m_ray.engines.reward.engine import gaussian_feedback
from r2m_ray.tasks.prepare.measurement import prepared_trunk, seeded
from r2m_ray.tasks.prepare.store import Prepared

QUERIES = 4
"""Random queries that pool h by attention, the same ones for every response of a seed."""
SHARPNESS = 2.0
"""Standard deviation of an attention's logits over states of norm √P, about: each query picks some states."""


def precheck(config: Config, prepared: Prepared, prompts: int, responses_per_prompt: int) -> Information:
    """Sample from the prepared policy and ask what H_last, h and both together explain of gold.

    The prompts belong to a split of their own. Everything is drawn from ``config.run.seed``.
    """
    policy, tokenizer = load_policy(prepared.policy_dir)
    with seeded(config.run.seed):
        query_QP = torch.randn(QUERIES, policy.config.hidden_size)
        samples = sample(config, policy, tokenizer, "precheck", prompts, responses_per_prompt)
    rte_ND, _ = prepared_trunk(config, prepared.reward_dir).read(samples.prompts, samples.responses)
    return information(
        rte_ND.double().numpy(),
        pooled(head_rows(config, policy, tokenizer, samples), query_QP).double().numpy(),
        samples.gold_N,
        samples.prompt_N,
        seed=config.run.seed,
    )


def pooled(rows: Iterable[tuple[int, Tensor]], query_QP: Tensor) -> Tensor:
    """h of each row in one vector, [N, F]: its mean, its maximum, and its mean under each query's attention.

    rows: of each, the first state that predicts the response, and all states [S, P]. Each pooling is taken
    over the states that predict the response, and over the whole row.
    """
    return torch.stack(
        [torch.cat([_pooled(row_SP[first:], query_QP), _pooled(row_SP, query_QP)]) for first, row_SP in rows]
    )


def head_rows(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples
) -> Iterator[tuple[int, Tensor]]:
    """What a run's head would read: the last layer after the final norm, with noise by ``feedback.noise``."""
    rows, firsts = policy_rows(tokenizer, samples)
    last_TP = torch.cat([states_LSP[-1] for states_LSP in hidden_states(policy, rows)])
    if config.feedback.noise:
        last_TP = gaussian_feedback(last_TP, config.feedback.noise, config.run.seed)
    yield from zip(firsts, last_TP.split([len(row) for row in rows]), strict=True)


def _pooled(hidden_SP: Tensor, query_QP: Tensor) -> Tensor:
    weight_QS = torch.softmax(SHARPNESS * query_QP @ hidden_SP.T / hidden_SP.shape[1] ** 0.5, -1)
    return torch.cat([hidden_SP.mean(0), hidden_SP.amax(0), (weight_QS @ hidden_SP).flatten()])


def main() -> None:
    """Prepare each seed's world where it is not there yet, and print and write its pre-check."""
    parsed = parser(__doc__, prompts=512, out="precheck.json").parse_args()
    found = {}
    for seed in parsed.seeds:
        words = (*parsed.overrides, f"run.seed={seed}")
        one = precheck(recipe(words).config, prepare(words), parsed.prompts, parsed.responses)
        found[seed] = {**asdict(one), "gains": one.gains}
        print(f"seed {seed}: {found[seed]}", flush=True)
    write(parsed.out, {"overrides": parsed.overrides, "seeds": found})


if __name__ == "__main__":
    main()
