"""What a weight sync costs: seconds and bytes from learner to rollout engine, with and without digest.

The real path: a DeepSpeed learner and a vLLM engine in their own Ray actors, buckets through the object
store, loaded by vLLM's weight-transfer interface. Policies of several widths; verified and unverified
syncs alternate.

    python benchmarks/weight_sync.py [--widths 96 512] [--repeats 7] [--out FILE] [hydra overrides]

Needs the demo's models, for the tokenizer and the reward role: `r2m-ray prepare experiment=demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, summary, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.start import Crew
from r2m_ray.tasks.models import Models

LAYERS = 4


def policy_of_width(width: int, tokenizer_dir: str, directory: Path) -> tuple[str, int]:
    """A random policy of four layers with the demo's tokenizer, and its parameter count."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 32,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory), model.num_parameters()


async def measure(config: Config, models: Models, repeats: int) -> dict[str, Any]:
    placement = Placement(config)
    try:
        roles = await Crew(config, models, placement, print).start()
        seconds: dict[str, list[float]] = {"verified": [], "unverified": []}
        # Version 0 of `verify_every=2` is verified and warms up; odd versions are not verified.
        for version in range(2 * repeats + 2):
            start = time.perf_counter()
            stats = await roles.sync(version=version)
            if version >= 2:
                seconds["verified" if stats["verified"] else "unverified"].append(time.perf_counter() - start)
    finally:
        placement.release()
    return {
        "bytes": stats["bytes"],
        "buckets": stats["buckets"],
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "bytes_per_second": stats["bytes"] / summary(seconds["unverified"])["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 512, 1024])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("weight_sync.json"))
    arguments, overrides = parser.parse_known_args()
    config = load_config(["experiment=demo", "sync.verify_every=2", "sync.bucket_mb=64", *overrides])
    prepared = Models.of(config)
    results = {}
    with tempfile.TemporaryDirectory() as scratch, cluster(config.cluster):
        for width in arguments.widths:
            policy, parameters = policy_of_width(width, prepared.policy, Path(scratch) / str(width))
            models = Models(policy=policy, reward=prepared.reward, reference=policy)
            result = asyncio.run(measure(config, models, arguments.repeats))
            results[str(width)] = {"parameters": parameters, **result}
    write(arguments.out, {"benchmark": "weight_sync", "machine": machine(), "by_width": results})
    for width, result in results.items():
        print(f"width {width}: {result['bytes'] / 2**20:.1f} MiB in {result['seconds']}")


if __name__ == "__main__":
    main()
