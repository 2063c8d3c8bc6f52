"""Rollout throughput with the export of hidden states against the same engine without it.

    OMP_NUM_THREADS=1 python benchmarks/export.py --repeats 9 --out export.json

vLLM holds one connector per process, so each side is an engine in a process of its own; the parent
lets them sample in turn, one at a time. Both sample the same plans with the same seeds, so they do
the same work token for token, and the export's side also hands its hidden states over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 160
PROMPT_TOKENS = 37
END_TOKEN = 2
SIDES = ("export", "no_export")


def save_policy(directory: Path, arguments: argparse.Namespace) -> int:
    """Write a random Llama with a word-level tokenizer; returns its number of parameters."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": END_TOKEN, "<unk>": 3}
    words |= {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.width,
            intermediate_size=4 * arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.width // 32,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=END_TOKEN,
            initializer_range=0.3,
        )
    )
    # Logits spread over ±3; an end token at 0 is hardly ever drawn, so rows reach their full length.
    with torch.no_grad():
        model.lm_head.weight[END_TOKEN].zero_()
    model.save_pretrained(directory)
    return int(model.num_parameters())


def serve(side: str, model_dir: str, arguments: argparse.Namespace) -> None:
    """One side: start an engine, then sample one batch for each line on stdin and report it on stdout."""
    # Libraries may write to stdout; what the parent reads goes through a copy of it.
    replies = sys.stdout
    sys.stdout = sys.stderr
    from r2m_ray.core.batch import Prompt, SamplePlan
    from r2m_ray.engines.rollout.engine import RolloutEngine

    engine = RolloutEngine(
        model_dir=model_dir,
        dtype="float32",
        seed=0,
        max_model_len=PROMPT_TOKENS + arguments.new_tokens,
        export_hidden=side == "export",
        engine_args={"enforce_eager": True},
    )
    prompts = tuple(
        Prompt(index=i, text=" ".join(f"w{4 + (7 * i + j) % 150}" for j in range(PROMPT_TOKENS)))
        for i in range(arguments.rows // arguments.group)
    )
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for step, _ in enumerate(sys.stdin):
        plan = SamplePlan(
            prompts=prompts,
            group_size=arguments.group,
            step=step,
            seed=0,
            temperature=1.0,
            max_new_tokens=arguments.new_tokens,
        )
        ((rows, hidden),) = engine.sample([plan])
        reply = {
            "tokens": int(rows.action_T.sum()),
            "label_sum": int(rows.label_T.sum()),
            "hidden": list(hidden.hidden_TP.shape),
        }
        print(json.dumps(reply), file=replies, flush=True)


def start(side: str, model_dir: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    sizes = [f"--rows={arguments.rows}", f"--group={arguments.group}", f"--new-tokens={arguments.new_tokens}"]
    return subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--model", model_dir, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def reply_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an engine ended with status {process.wait()}; see its output above")
    reply: dict[str, Any] = json.loads(line)
    return reply


def sampler(process: subprocess.Popen[str], replies: list[dict[str, Any]]) -> Callable[[], None]:
    """A call that lets one side sample its next batch, and waits for it."""

    def sample() -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        replies.append(reply_of(process))

    return sample


def compared(model_dir: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens per second of both sides, and the ratio of each round's throughputs."""
    processes = {side: start(side, model_dir, arguments) for side in SIDES}
    try:
        for process in processes.values():
            reply_of(process)
        replies: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        times = measure.alternating(
            {side: sampler(process, replies[side]) for side, process in processes.items()}, arguments.repeats
        )
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for ours, theirs in zip(*replies.values(), strict=True):
        assert (ours["tokens"], ours["label_sum"]) == (theirs["tokens"], theirs["label_sum"])
    # The first reply of each side is the warm-up's.
    rates = {
        side: [reply["tokens"] / s for reply, s in zip(replies[side][1:], times[side], strict=True)]
        for side in SIDES
    }
    ratios = [ours / theirs for ours, theirs in zip(rates["export"], rates["no_export"], strict=True)]
    return {
        "tokens_per_batch": replies["export"][-1]["tokens"],
        "hidden_per_batch": replies["export"][-1]["hidden"],
        "seconds": {side: measure.summary(times[side]) for side in SIDES},
        "tokens_per_second": {side: measure.summary(rates[side]) for side in SIDES},
        "throughput_ratio": measure.summary(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--group", type=int, default=8, help="rows per prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="export.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side, arguments.model, arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        parameters = save_policy(Path(directory), arguments)
        result = {
            "benchmark": "export",
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("side", "model")},
            "parameters": parameters,
            "machine": measure.machine(),
            **compared(directory, arguments),
        }
    measure.write(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
