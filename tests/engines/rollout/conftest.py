"""Rollout engines for the tests of this folder, and transformers' own reading of what they sampled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from r2m_ray.core.batch import Prompt, SamplePlan, Trajectories
from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.engines.rollout.vllm_engine import prepare_environment

# Small blocks, so that longer prompts fill some and the prefix cache has something to share.
ENGINE_ARGS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 64}
STOP_TOKENS = [2, 9]


@contextmanager
def running(model_dir: Path, **arguments: Any) -> Iterator[RolloutEngine]:
    # Bit-identity across batches is promised for one thread.
    torch.set_num_threads(1)
    settings = {
        "model_dir": str(model_dir),
        "dtype": "float32",
        "seed": 0,
        "max_model_len": 128,
        "export_hidden": True,
    }
    engine_args = ENGINE_ARGS | arguments.pop("engine_args", {})
    engine = RolloutEngine(**(settings | arguments), engine_args=engine_args)
    try:
        yield engine
    finally:
        engine.close()


def plan(**changes: Any) -> SamplePlan:
    """6 prompts of 3 to 63 words in 4 rows each, at temperature 0.7."""
    prompts = tuple(
        Prompt(index=i, text=" ".join(f"w{(7 * i + j) % 150}" for j in range(3 + 12 * i))) for i in range(6)
    )
    settings = {
        "prompts": prompts,
        "group_size": 4,
        "step": 1,
        "seed": 3,
        "temperature": 0.7,
        "max_new_tokens": 20,
    }
    return SamplePlan(**(settings | changes))


def readings(model: PreTrainedModel, rows: Trajectories) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Where each row lies, its last hidden states [S−1, P] and its logits [S−1, V], row by row."""
    for n in range(rows.layout.rows):
        where = rows.layout.slice_of(n)
        with torch.no_grad():
            hidden = model.get_decoder()(rows.input_T[where][None]).last_hidden_state[0]
            yield where, hidden, model.get_output_embeddings()(hidden)


@pytest.fixture(scope="module", params=["synchronous", "asynchronous"])
def scheduling(request: pytest.FixtureRequest) -> Iterator[str]:
    """How vLLM schedules: asynchronously, as it does by default on GPUs, or not, as it does on CPUs."""
    prepare_environment({})
    from vllm.platforms.cpu import CpuPlatform

    # vLLM calls it on the class.
    check = CpuPlatform.check_and_update_config.__func__

    def keep_asynchronous(platform: type[CpuPlatform], config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(platform, config)
        config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "asynchronous":
            patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_asynchronous))
        yield request.param


@pytest.fixture(scope="module")
def start_engine(scheduling: str) -> Callable[..., AbstractContextManager[RolloutEngine]]:
    """Starts an engine, under both kinds of scheduling."""

    @contextmanager
    def started(model_dir: Path, **arguments: Any) -> Iterator[RolloutEngine]:
        with running(model_dir, **arguments) as engine:
            config = engine._vllm._llm.llm_engine.vllm_config
            assert config.scheduler_config.async_scheduling == (scheduling == "asynchronous")
            yield engine

    return started


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., SamplePlan]:
    return plan


@pytest.fixture(scope="session")
def read_rows() -> Callable[[PreTrainedModel, Trajectories], Iterator[tuple[slice, Tensor, Tensor]]]:
    return readings


@pytest.fixture(scope="session")
def stop_tokens() -> list[int]:
    return STOP_TOKENS


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path) -> Path:
    """The tiny policy with a second end token in its generation config."""
    directory = tmp_path_factory.mktemp("two-ends") / "policy"
    shutil.copytree(tiny_policy_dir, directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": STOP_TOKENS}))
    return directory


@pytest.fixture(scope="session")
def policy(policy_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).eval()
