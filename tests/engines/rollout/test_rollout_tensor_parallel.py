"""Two tensor parallel ranks on a CPU: each keeps half of every hidden state, equal to transformers' own.

vLLM runs the ranks as processes of their own, so this also covers what is sent to such processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_rows import moved, readings, sample_plan
from transformers import AutoModelForCausalLM, PreTrainedModel

from r2m_ray.core.batch import Trajectories
from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.engines.weights import WeightDigest, pack_buckets
from r2m_ray.errors import DeviceLost, RunError

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def assert_states(policy: PreTrainedModel, rows: Trajectories, hidden: torch.Tensor) -> None:
    for where, expected, _ in readings(policy, rows):
        torch.testing.assert_close(hidden[where], expected, atol=1e-4, rtol=0)


def test_hidden_states_and_weights(
    start_engine: Callable[..., Any], policy_dir: Path, policy: PreTrainedModel
) -> None:
    with start_engine(policy_dir, engine_args=TWO_RANKS) as engine:
        for _ in range(2):
            ((rows, hidden),) = engine.sample([sample_plan(greedy_first=True)])
            assert_states(policy, rows, hidden.hidden_TP)
        assert engine.stats()["regenerated_rows"] == 0
        shapes = engine._vllm._llm.collective_rpc(_buffer_shape)
        assert [width for _, width in shapes] == [32, 32]
        model = moved(AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval(), seed=1)
        update(engine, model, 1)
        ((rows, hidden),) = engine.sample([sample_plan(temperature=0.0)])
        assert rows.version == 1
        assert_states(model, rows, hidden.hidden_TP)
        for where, _, logits in readings(model, rows):
            action = rows.action_T[where]
            assert torch.equal(logits.argmax(-1)[action], rows.label_T[where][action])
        with pytest.raises(RunError, match="sha256"):
            update(engine, model, 2, digest="0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine_args",
    [{"max_num_batched_tokens": 64, "max_num_seqs": 8}, {"num_gpu_blocks_override": 13}],
    ids=["chunked prefill", "preemption"],
)
def test_hidden_states_however_they_come(
    start_engine: Callable[..., Any],
    scheduling: str,
    policy_dir: Path,
    policy: PreTrainedModel,
    engine_args: dict[str, Any],
) -> None:
    if scheduling == "asynchronous" and "num_gpu_blocks_override" in engine_args:
        pytest.skip("refused; see test_rollout_hidden")
    with start_engine(policy_dir, engine_args=TWO_RANKS | engine_args) as engine:
        for _ in range(2):
            ((rows, hidden),) = engine.sample([sample_plan()])
            assert_states(policy, rows, hidden.hidden_TP)
        assert engine.stats()["regenerated_rows"] == 0


@pytest.mark.slow
def test_a_dead_rank_is_a_lost_device(start_engine: Callable[..., Any], policy_dir: Path) -> None:
    with start_engine(policy_dir, engine_args=TWO_RANKS) as engine:
        os.kill(engine._vllm._llm.llm_engine.model_executor.workers[1].proc.pid, signal.SIGKILL)
        with pytest.raises(DeviceLost, match="rollout engine: one of its workers failed"):
            engine.sample([sample_plan()])


def update(engine: RolloutEngine, model: PreTrainedModel, version: int, digest: str | None = None) -> None:
    hashed = WeightDigest()
    engine.begin_weight_update()
    for bucket in pack_buckets(model.named_parameters(), 50_000):
        hashed.update(bucket)
        engine.load_bucket(bucket)
    engine.finish_weight_update(version=version, digest=digest or hashed.hexdigest())


def _buffer_shape(worker: Any) -> tuple[int, ...]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return tuple(get_kv_transfer_group().buffer._hidden.shape)
