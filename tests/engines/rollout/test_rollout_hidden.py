"""Exported hidden states equal transformers' own, however vLLM came to compute them, and cost no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_rows import readings, sample_plan
from transformers import PreTrainedModel

from r2m_ray.core.batch import Trajectories
from r2m_ray.errors import InputError

ENGINES = {
    "prefix cache": {},
    "no prefix cache": {"enable_prefix_caching": False},
    # Prompts of up to 63 tokens, three rows at a time: most are read in several steps.
    "chunked prefill": {"max_num_batched_tokens": 64, "max_num_seqs": 8},
    # 24 rows of up to 3 blocks each compete for 12 blocks.
    "preemption": {"num_gpu_blocks_override": 13},
}


@pytest.fixture(scope="module")
def without_export(start_engine: Callable[..., Any], policy_dir: Path) -> Trajectories:
    """The plan's rows from an engine that exports nothing."""
    with start_engine(policy_dir, export_hidden=False) as engine:
        ((rows, hidden),) = engine.sample([sample_plan(greedy_first=True)])
    assert hidden.hidden_TP.shape == (rows.layout.tokens, 0)
    return rows


@pytest.mark.parametrize("name", ENGINES)
def test_every_row_equals_transformers_and_no_token_changes(
    start_engine: Callable[..., Any],
    policy_dir: Path,
    policy: PreTrainedModel,
    without_export: Trajectories,
    scheduling: str,
    name: str,
) -> None:
    engine_args = ENGINES[name]
    if (scheduling, name) == ("asynchronous", "preemption"):
        # Tokens would change, so the engine refuses to start and leaves room for another.
        with (
            pytest.raises(InputError, match="async_scheduling=false"),
            start_engine(policy_dir, engine_args=engine_args),
        ):
            pass
        return
    with start_engine(policy_dir, engine_args=engine_args) as engine:
        preempted = count_preemptions(engine)
        # The second time, long prompts come from the prefix cache where there is one.
        shards = [engine.sample([sample_plan(greedy_first=True)])[0] for _ in range(2)]
        assert engine.stats()["regenerated_rows"] == 0
    assert bool(preempted) == ("num_gpu_blocks_override" in engine_args)
    for rows, hidden in shards:
        assert torch.equal(rows.label_T, without_export.label_T)
        assert torch.equal(rows.rollout_logp_T, without_export.rollout_logp_T)
        assert hidden.hidden_TP.dtype == torch.float32
        for where, expected, _ in readings(policy, rows):
            torch.testing.assert_close(hidden.hidden_TP[where], expected, atol=1e-4, rtol=0)


def count_preemptions(engine: Any) -> list[str]:
    """Names of the requests that the engine preempts from now on."""
    scheduler = engine._vllm._llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    preempted: list[str] = []

    def noted(request: Any, *arguments: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *arguments, **options)

    scheduler._preempt_request = noted
    return preempted
