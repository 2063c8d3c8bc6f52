"""A learner's process group of one rank, and a policy whose head is its embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from models import save_model
from ranks import free_port
from transformers import Qwen2ForCausalLM


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A learner process group of this process alone, ended with the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
            # The learner sets these itself; named here, they are restored afterwards.
            patch.setenv(name, "")
        yield
        # Here, to spare the tests without a learner. Torch's own would leave DeepSpeed's groups behind.
        from deepspeed import comm

        comm.destroy_process_group()


@pytest.fixture(scope="session")
def tied_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of width 48 whose head is its embedding, with biases."""
    return save_model(
        tmp_path_factory.mktemp("tied_policy"),
        Qwen2ForCausalLM,
        seed=3,
        width=48,
        heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
