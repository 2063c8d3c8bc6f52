"""Rollout engines for the tests of this folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_rows import STOP_TOKENS
from transformers import AutoModelForCausalLM, PreTrainedModel

from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.engines.rollout.vllm_engine import prepare_environment

# Small blocks, so that longer prompts fill some and the prefix cache has something to share.
ENGINE_ARGS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 64}


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
