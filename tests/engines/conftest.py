"""A process group for learners, and a policy of another architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import free_port
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


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
