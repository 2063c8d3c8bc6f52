"""What the parts of the GPU proof have in common: sizes, models of random weights, data and configuration."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Prompt, SamplePlan

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
GIB = 2**30
NEXT_DTYPE = {"bfloat16": torch.float32, "float32": torch.float64}
"""The type of more digits in which a result of each type is examined."""
ALLOWED_ERROR = 4.0
"""How many times the rounding error of transformers in the same type a result may have."""


class Absent(Exception):
    """A part needs something that this machine does not have; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One scale of the proof: the policy's shape, a step's batch, and how often a thing is measured.

    The reward model has the policy's shape. syncs: with a digest, and as many without. kv_cache_bytes: of
    each rollout engine, so that several share a GPU. head_widths, head_rows, head_tokens: of the states that
    the head reads alone. copy_bytes: of the copy that measures the memory.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    tied: bool
    init_std: float
    dtype: str
    prompts: int
    group_size: int
    prompt_words: int
    new_tokens: int
    repeats: int
    syncs: int
    steps: int
    kv_cache_bytes: int
    head_widths: tuple[int, ...]
    head_rows: int
    head_tokens: int
    copy_bytes: int

    @property
    def max_model_len(self) -> int:
        return self.prompt_words + self.new_tokens


FULL = Sizes(
    # The shape of Qwen2.5-0.5B, in a Llama: transformers gives Qwen2 models no tokenizer but their own.
    layers=24,
    width=896,
    heads=14,
    kv_heads=2,
    mlp_width=4864,
    vocabulary=151936,
    tied=True,
    init_std=0.02,
    dtype="bfloat16",
    prompts=16,
    group_size=8,
    prompt_words=128,
    new_tokens=128,
    repeats=7,
    syncs=3,
    steps=10,
    kv_cache_bytes=3 * GIB,
    head_widths=(896, 4096),
    head_rows=256,
    head_tokens=1024,
    copy_bytes=4 * GIB,
)
DRY = Sizes(
    layers=2,
    width=64,
    heads=2,
    kv_heads=1,
    mlp_width=128,
    vocabulary=160,
    tied=True,
    init_std=0.3,
    dtype="float32",
    prompts=4,
    group_size=4,
    prompt_words=12,
    new_tokens=12,
    repeats=2,
    syncs=2,
    steps=4,
    kv_cache_bytes=GIB // 4,
    head_widths=(64,),
    head_rows=8,
    head_tokens=64,
    copy_bytes=2**24,
)


def device() -> torch.device:
    """The accelerator of this process, or its CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def policy_dir(scratch: Path, sizes: Sizes, seed: int = 0) -> Path:
    """A policy of random weights with a tokenizer of numbered words; made when it is first asked for."""
    return _saved(scratch / f"policy-{seed}", LlamaForCausalLM, sizes, seed)


def reward_dir(scratch: Path, sizes: Sizes) -> Path:
    """A reward model of random weights that has the policy's shape and tokenizer."""
    return _saved(scratch / "reward", LlamaForSequenceClassification, sizes, seed=7)


def preference_file(scratch: Path, sizes: Sizes) -> Path:
    """Preference pairs of random words; every prompt has `prompt_words` tokens."""
    path = scratch / "pairs.jsonl"
    scratch.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = [
        {"prompt": words(draw, sizes, sizes.prompt_words), "chosen": f"w{n} w1", "rejected": f"w{n} w2"}
        for n in range(8 * sizes.prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(draw: random.Random, sizes: Sizes, count: int) -> str:
    """A text of so many random words, one token each."""
    return " ".join(f"w{draw.randrange(sizes.vocabulary - len(SPECIALS))}" for _ in range(count))


def plan(sizes: Sizes, step: int = 1) -> SamplePlan:
    """A batch to sample, the same one for each step but for its seeds."""
    draw = random.Random(1)
    return SamplePlan(
        prompts=tuple(
            Prompt(index=n, text=words(draw, sizes, sizes.prompt_words)) for n in range(sizes.prompts)
        ),
        group_size=sizes.group_size,
        step=step,
        seed=0,
        temperature=1.0,
        max_new_tokens=sizes.new_tokens,
    )


def engine_args(sizes: Sizes) -> dict[str, Any]:
    """vLLM's own defaults on a GPU: CUDA graphs, asynchronous scheduling and its choice of model runner.

    A fixed cache lets engines share the device: vLLM would measure free memory while the others take theirs.
    """
    if not torch.accelerator.is_available():
        return {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 512, "max_num_seqs": 64}
    return {
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": sizes.kv_cache_bytes,
        "max_num_seqs": sizes.prompts * sizes.group_size,
    }


def run_config(scratch: Path, sizes: Sizes, *overrides: str, share: float = 0.125) -> Config:
    """The configuration of `run_overrides`."""
    return load_config(run_overrides(scratch, sizes, *overrides, share=share))


def run_overrides(scratch: Path, sizes: Sizes, *overrides: str, share: float = 0.125) -> list[str]:
    """Overrides of a run with these sizes, in which every actor has a share of the one GPU."""
    gpu = torch.accelerator.is_available()
    pairs = preference_file(scratch, sizes)
    roles = ("learner", "rollout", "reward", "reference") if gpu else ()
    arguments = engine_args(sizes)
    if not gpu:
        arguments = {"num_gpu_blocks_override": arguments["num_gpu_blocks_override"]}
    return [
        f"cluster={'gpu_node' if gpu else 'laptop'}",
        *("task=preferences", "algo=rloo", "logging=disabled"),
        *(f"task.train_file={pairs}", f"task.eval_file={pairs}"),
        *(f"task.max_prompt_tokens={sizes.prompt_words}", f"task.max_new_tokens={sizes.new_tokens}"),
        *(f"model.policy={policy_dir(scratch, sizes)}", f"model.reward={reward_dir(scratch, sizes)}"),
        *(f"model.dtype={sizes.dtype}", f"model.reward_dtype={sizes.dtype}"),
        *(f"algo.prompts_per_step={sizes.prompts}", f"algo.responses_per_prompt={sizes.group_size}"),
        f"algo.prompts_per_shard={max(1, sizes.prompts // 4)}",
        f"algo.minibatch_prompts={sizes.prompts // 2}",
        *("policy.ranks=1", "policy.gradient_checkpointing=false", "rollout.replicas=1"),
        *("policy.learning_rate=1e-6", "reward.learning_rate=1e-6"),
        *("++policy.deepspeed.zero_optimization.stage=0", "sync.backend=object_store"),
        *(f"cluster.{name}" for name in ("cpus=8", f"object_store_gb={2.0 if gpu else 0.4}")),
        *("cluster.cpus_per_actor=0.5", "cluster.start_timeout_s=300", "cluster.phase_timeout_s=300"),
        *(f"cluster.gpus_per_{role}={share}" for role in roles),
        *(f"++rollout.engine_args.{name}={value}" for name, value in arguments.items()),
        *overrides,
    ]


def exact_model(directory: Path | str, dtype: torch.dtype) -> PreTrainedModel:
    """The policy on this process's device, with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
    )
    return model.to(device()).eval()


def compared_errors(found: Tensor, same_type: Tensor, exact: Tensor) -> dict[str, Any]:
    """How far two results of one type are from the same in more digits, row by row.

    Args:
        found: the result that is examined, [T, …].
        same_type: transformers' own result in the same type, whose error is rounding alone.
        exact: transformers' result in the type of more digits.

    Returns the median and largest error of both, relative to the norm of the exact rows (or, for scalars, to
    the mean size), and whether `found` is within `ALLOWED_ERROR` of rounding.
    """
    exact = exact.double().cpu()
    scale = exact.norm(dim=1) if exact.dim() > 1 else exact.abs().mean()
    errors = {}
    for name, value in (("found", found), ("transformers", same_type)):
        difference = value.double().cpu() - exact
        error_T = (difference.norm(dim=1) if difference.dim() > 1 else difference.abs()) / scale
        errors[name] = {"median": float(error_T.median()), "max": float(error_T.max())}
    within = all(errors["found"][k] <= ALLOWED_ERROR * errors["transformers"][k] for k in ("median", "max"))
    return {"rows": len(exact), "relative_error": errors, "within_rounding": within}


def _saved(directory: Path, kind: Any, sizes: Sizes, seed: int) -> Path:
    if (directory / "tokenizer.json").exists():
        return directory
    torch.manual_seed(seed)
    model = kind(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=2 * sizes.max_model_len + 64,
            tie_word_embeddings=sizes.tied,
            initializer_range=sizes.init_std,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            num_labels=1,
        )
    )
    model.to(getattr(torch, sizes.dtype)).save_pretrained(directory)
    known = {word: n for n, word in enumerate(SPECIALS)}
    known |= {f"w{n}": n + len(SPECIALS) for n in range(sizes.vocabulary - len(SPECIALS))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory
