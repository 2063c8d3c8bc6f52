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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 160
PROMPT_TOKENS = 37
END_TOKEN = 2
SIDES = ("export", "no_export")
RAW = "raw"


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


class RawVLLM:
    """vLLM by itself: the requests of a plan in, tokens and log-probs out."""

    def __init__(self, model_dir: str, arguments: argparse.Namespace) -> None:
        from r2m_ray.engines.rollout.vllm_engine import prepare_environment

        engine_args = json.loads(arguments.engine_args)
        prepare_environment(engine_args)
        import vllm

        self._vllm = vllm
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
        self._llm = vllm.LLM(
            model=model_dir,
            dtype=arguments.dtype,
            seed=0,
            max_model_len=arguments.prompt_tokens + arguments.new_tokens,
            logprobs_mode="processed_logprobs",
            **engine_args,
        )

    def sample(self, plan: Any) -> dict[str, Any]:
        from r2m_ray.engines.rollout.engine import row_seed

        rows = [
            (self._tokenizer(prompt.text).input_ids, row_seed(plan.seed, plan.step, prompt.index, row))
            for prompt in plan.prompts
            for row in range(plan.group_size)
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in rows],
            [
                self._vllm.SamplingParams(
                    seed=seed,
                    max_tokens=plan.max_new_tokens,
                    stop_token_ids=[END_TOKEN],
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for _, seed in rows
            ],
            use_tqdm=False,
        )
        sampled = [list(output.outputs[0].token_ids) for output in outputs]
        labels = sum(sum(ids[1:]) + sum(new) for (ids, _), new in zip(rows, sampled, strict=True))
        return {"tokens": sum(map(len, sampled)), "label_sum": labels}


class Ours:
    """The rollout engine, with or without its export; keeps the last batch."""

    def __init__(self, model_dir: str, arguments: argparse.Namespace, *, export: bool) -> None:
        from r2m_ray.engines.rollout.engine import RolloutEngine

        self._arguments = arguments
        self._engine = RolloutEngine(
            model_dir=model_dir,
            dtype=arguments.dtype,
            seed=0,
            max_model_len=arguments.prompt_tokens + arguments.new_tokens,
            export_hidden=export,
            engine_args=json.loads(arguments.engine_args),
        )

    def sample(self, plan: Any) -> dict[str, Any]:
        ((self.rows, self.hidden),) = self._engine.sample([plan])
        return {
            "tokens": int(self.rows.action_T.sum()),
            "label_sum": int(self.rows.label_T.sum()),
            "hidden": list(self.hidden.hidden_TP.shape),
        }

    def modes(self) -> dict[str, Any]:
        """How this vLLM computes, which differs between devices."""
        config = self._engine._vllm._llm.llm_engine.vllm_config
        return {
            "second_model_runner": bool(config.use_v2_model_runner),
            "asynchronous_scheduling": bool(config.scheduler_config.async_scheduling),
            "cuda_graphs": config.compilation_config.cudagraph_mode.name,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        }


def serve(side: str, model_dir: str, arguments: argparse.Namespace) -> None:
    """One side: start an engine, then sample one batch for each line on stdin and report it on stdout.

    The line "states" writes the last batch's exported states and tokens to a file instead.
    """
    # Libraries may write to stdout; what the parent reads goes through a copy of it.
    replies = sys.stdout
    sys.stdout = sys.stderr
    from r2m_ray.core.batch import Prompt, SamplePlan

    engine: Any = (
        RawVLLM(model_dir, arguments)
        if side == "raw"
        else Ours(model_dir, arguments, export=side == "export")
    )
    prompts = tuple(
        Prompt(index=i, text=" ".join(f"w{4 + (7 * i + j) % 150}" for j in range(arguments.prompt_tokens)))
        for i in range(arguments.rows // arguments.group)
    )
    modes = engine.modes() if side != "raw" else {}
    print(json.dumps({"ready": True, "modes": modes}), file=replies, flush=True)
    for step, line in enumerate(sys.stdin):
        if line.strip():
            rows, hidden = engine.rows, engine.hidden
            save_file(
                {"input_T": rows.input_T, "offsets": rows.layout.offsets, "hidden_TP": hidden.hidden_TP},
                line.strip(),
            )
            reply: dict[str, Any] = {"saved": line.strip()}
        else:
            plan = SamplePlan(
                prompts=prompts,
                group_size=arguments.group,
                step=step,
                seed=0,
                temperature=1.0,
                max_new_tokens=arguments.new_tokens,
            )
            reply = engine.sample(plan)
        print(json.dumps(reply), file=replies, flush=True)


def start(side: str, model_dir: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    names = ("rows", "group", "prompt_tokens", "new_tokens", "dtype", "engine_args")
    passed = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    return subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--model", model_dir, *passed],
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


def ask(process: subprocess.Popen[str], line: str = "") -> dict[str, Any]:
    """Send one line to a side, and wait for its reply."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return reply_of(process)


def sampler(process: subprocess.Popen[str], replies: list[dict[str, Any]]) -> Callable[[], None]:
    """A call that lets one side sample its next batch, and waits for it."""
    return lambda: replies.append(ask(process))


def compared(
    model_dir: str, arguments: argparse.Namespace, sides: Sequence[str] = SIDES, states: str = ""
) -> dict[str, Any]:
    """Seconds and tokens per second of all sides, and the ratio of each round's throughputs to the export's.

    Args:
        model_dir: the policy.
        arguments: of the command line.
        sides: "export" first, then those that it is compared with.
        states: a file for the exported states of the last batch; none where empty.
    """
    processes = {side: start(side, model_dir, arguments) for side in sides}
    try:
        ready = {side: reply_of(process) for side, process in processes.items()}
        replies: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        times = measure.alternating(
            {side: sampler(process, replies[side]) for side, process in processes.items()}, arguments.repeats
        )
        if states:
            ask(processes["export"], states)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    same = [{(r["tokens"], r["label_sum"]) for r in batch} for batch in zip(*replies.values(), strict=True)]
    # The first reply of each side is the warm-up's.
    rates = {
        side: [reply["tokens"] / s for reply, s in zip(replies[side][1:], times[side], strict=True)]
        for side in sides
    }
    return {
        "tokens_per_batch": replies["export"][-1]["tokens"],
        "hidden_per_batch": replies["export"][-1]["hidden"],
        "modes": ready["export"]["modes"],
        "batches_of_equal_tokens": sum(len(found) == 1 for found in same) / len(same),
        "seconds": {side: measure.summary(times[side]) for side in sides},
        "tokens_per_second": {side: measure.summary(rates[side]) for side in sides},
        "throughput_ratio": {
            side: measure.summary([a / b for a, b in zip(rates["export"], rates[side], strict=True)])
            for side in sides[1:]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--group", type=int, default=8, help="rows per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-args", default='{"enforce_eager": true}', help="of vLLM, as JSON")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="export.json")
    parser.add_argument("--side", choices=(*SIDES, RAW), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side, arguments.model, arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        parameters = save_policy(Path(directory), arguments)
        found = compared(directory, arguments)
        if found["batches_of_equal_tokens"] < 1:
            raise RuntimeError("the sides sampled other tokens, so their times cannot be compared")
        result = {
            "benchmark": "export",
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("side", "model")},
            "parameters": parameters,
            "machine": measure.machine(),
            **found,
        }
    measure.write(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
