"""Memory that real actors take, beside what `r2m-ray plan` says they will.

    python benchmarks/memory.py [--case small] [--out memory.json] [hydra overrides]

Random models are saved and trained for two steps by `r2m-ray train`, in processes of their own; this one
reads the memory of each actor every third of a second and keeps the largest. An actor's memory is its USS:
what would be freed if it ended, so neither the object store nor libraries that several actors share.
`--case tiny` is what PROCESS_BYTES of r2m_ray/cli/checks/memory.py was set from, so it is no check of the
plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import machine, write
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from r2m_ray.cli.checks.plan import Plan, plan
from r2m_ray.config.compose import load_config
from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.prepare.materials import RESPONSE_ONLY

INTERVAL_S = 0.3
RAY = "ray"
HEAD_WIDTH = 64
CASES = {"tiny": (128, 2, 128), "small": (512, 8, 384)}
"""Policy width and layers, and reward width with the same layers."""
COMMON = [
    "experiment=demo",
    "logging=disabled",
    "run.name=memory",
    "algo.steps=2",
    "algo.prompts_per_step=8",
    "algo.prompts_per_shard=2",
    "algo.minibatch_prompts=4",
    "evaluate.every=0",
    "evaluate.prompts=8",
    "evaluate.pairs=8",
    # Every slot of the cache is in use within two steps.
    "rollout.engine_args.num_gpu_blocks_override=192",
    "cluster.cpus=4",
]


def model_configs(case: str) -> dict[str, LlamaConfig]:
    """Configurations of the policy and the reward model."""
    width, layers, reward_width = CASES[case]
    tokenizer = note2answer.tokenizer()
    return {
        role: LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=role_width,
            intermediate_size=round(role_width * 8 / 3),
            num_hidden_layers=layers,
            num_attention_heads=role_width // HEAD_WIDTH,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            num_labels=1,
        )
        for role, role_width in (("policy", width), ("reward", reward_width))
    }


def save_models(directory: Path, case: str) -> list[str]:
    """Save a random policy and reward model with tokenizers; returns the overrides that name them."""
    torch.manual_seed(0)
    configs = model_configs(case)
    LlamaForCausalLM(configs["policy"]).save_pretrained(directory / "policy")
    LlamaForSequenceClassification(configs["reward"]).save_pretrained(directory / "reward")
    note2answer.tokenizer().save_pretrained(directory / "policy")
    note2answer.tokenizer(RESPONSE_ONLY).save_pretrained(directory / "reward")
    return [f"model.policy={directory / 'policy'}", f"model.reward={directory / 'reward'}"]


def role_of(process: psutil.Process, driver: int) -> str:
    """``policy``, ``driver``, ``ray`` …; an actor's title holds its class, as ``ray::PolicyActor.update``."""
    if process.pid == driver:
        return "driver"
    title = next(iter(process.cmdline()), "")
    actor = title.removeprefix("ray::").partition(".")[0]
    return actor.removesuffix("Actor").lower() if title.startswith("ray::") and "Actor" in actor else RAY


def measured(command: list[str]) -> dict[str, list[int]]:
    """Run a command and return the largest USS of each of its processes, in bytes, by role."""
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    roles: dict[int, str] = {}
    peaks: dict[int, int] = {}
    try:
        while run.poll() is None:
            for process in _family(run.pid):
                try:
                    role, used = role_of(process, run.pid), process.memory_full_info().uss
                except psutil.Error:
                    # It ended while it was being read.
                    continue
                # An actor is one of Ray's idle workers first.
                roles[process.pid] = roles.get(process.pid, role) if role == RAY else role
                peaks[process.pid] = max(used, peaks.get(process.pid, 0))
            time.sleep(INTERVAL_S)
    finally:
        run.terminate()
        run.wait()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
    found = {role: [peaks[pid] for pid in roles if roles[pid] == role] for role in set(roles.values())}
    return {role: sorted(values, reverse=True) for role, values in sorted(found.items())}


def _family(pid: int) -> list[psutil.Process]:
    """A process and everything below it; nothing once it ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def compared(planned: Plan, found: dict[str, list[int]]) -> dict[str, Any]:
    """Planned and measured bytes of each role's largest actor, and planned over measured."""
    document = planned.document()
    rows = {actor.role: (actor.host, max(found[actor.role])) for actor in planned.actors}
    rows["driver"] = (document["driver"], max(found["driver"]))
    # A local cluster's processes are planned together.
    rows[RAY] = (document["ray"], sum(found[RAY]))
    return {
        role: {"planned": ours, "measured": theirs, "ratio": ours / theirs}
        for role, (ours, theirs) in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="small")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        words = [*COMMON, *save_models(Path(directory), arguments.case), f"run.root={directory}/runs"]
        words += overrides
        planned = plan(load_config(words))
        found = measured([sys.executable, "-m", "r2m_ray", "train", *words])
    result = {
        "benchmark": "memory",
        "case": arguments.case,
        "overrides": overrides,
        "machine": machine(),
        "parameters": {role: sizes.parameters for role, sizes in planned.models.items()},
        "memory": compared(planned, found),
        "measured_uss": found,
        "actors": planned.document()["actors"],
    }
    write(arguments.out, result)
    print(json.dumps(result["memory"], indent=2))
    for role, row in result["memory"].items():
        print(f"{role:<10} planned / measured = {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
