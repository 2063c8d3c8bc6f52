"""Rows for the learner and the reference: random tokens, with log-probs and advantages to train on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from learner_rows import learner_config, policy_batch, trajectories
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import PolicyBatch, Trajectories


@pytest.fixture(scope="session")
def make_trajectories() -> Callable[[int], Trajectories]:
    return trajectories


@pytest.fixture(scope="session")
def make_policy_batch() -> Callable[[int], PolicyBatch]:
    return policy_batch


@pytest.fixture(scope="session")
def make_learner_config() -> Callable[..., Config]:
    return learner_config


@pytest.fixture(scope="module")
def one_rank(free_port: Callable[[], int]) -> Iterator[None]:
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
def free_port() -> Callable[[], int]:
    def port() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return port


@pytest.fixture(scope="session")
def tied_policy_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A Qwen2 of width 48 whose head is its embedding, with biases, fp32."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tied_policy")
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory
