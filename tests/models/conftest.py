"""Rows for the learner and the reference: random tokens, with log-probs and advantages to train on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from r2m_ray.batch import PolicyBatch, ReferenceLogprobs, Trajectories, pack_rows
from r2m_ray.config import AlgoConfig, Config, PolicyConfig, RewardConfig, TaskConfig

K = 4
PROMPTS_PER_SHARD = 2


def trajectories(seed: int) -> Trajectories:
    """One shard: 2 prompts of 2–9 tokens and 4 responses each of 1–8, of a vocabulary of 160."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(4, 160, (length,), generator=generator).tolist()

    prompts = [ids(2, 10) for _ in range(PROMPTS_PER_SHARD)]
    responses = [ids(1, 9) for _ in range(PROMPTS_PER_SHARD * K)]
    logprobs = [(-3 * torch.rand(len(r), generator=generator)).tolist() for r in responses]
    return pack_rows(
        [f"prompt {i}" for i in range(PROMPTS_PER_SHARD)],
        prompts,
        responses,
        [f"response {i}" for i in range(len(responses))],
        logprobs=logprobs,
        version=0,
    )


def policy_batch(seed: int) -> PolicyBatch:
    """`trajectories(seed)` with random advantages and reference log-probs."""
    rows = trajectories(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    reference_T = torch.where(rows.action_T, -6 * torch.rand(rows.layout.tokens, generator=generator), 0)
    return PolicyBatch(
        trajectories=rows,
        advantage_N=torch.randn(rows.layout.rows, generator=generator),
        reference=ReferenceLogprobs(tempered_T=reference_T, unit_T=0.9 * reference_T),
    )


def learner_config(stage: int = 2) -> Config:
    """Two shards to a mini-batch, two epochs, feedback on; ZeRO-3 partitions even the smallest parameters.

    Adam's epsilon is large: with a tiny one the first steps are ±lr however small the gradient, and rounding
    decides the sign where a gradient is 0.
    """
    deepspeed = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"params": {"eps": 1e-2}},
    }
    return Config(
        algo=AlgoConfig(
            prompts_per_step=6,
            responses_per_prompt=K,
            prompts_per_shard=PROMPTS_PER_SHARD,
            minibatch_prompts=2 * PROMPTS_PER_SHARD,
            epochs=2,
            temperature=0.7,
        ),
        policy=PolicyConfig(learning_rate=1e-3, tokens_per_microbatch=64, deepspeed=deepspeed),
        reward=RewardConfig(omega_floor=0.6),
        task=TaskConfig(max_new_tokens=8),
    )


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
