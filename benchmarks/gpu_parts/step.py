"""A training step of R2M over one of vanilla, steps alternating: the real loop, all roles on one GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import step_time
from gpu_parts import setup

from r2m_ray.runtime.cluster import cluster


def run(sizes: setup.Sizes, scratch: Path) -> dict[str, Any]:
    """Seconds of every phase of both sides, and the ratio of each pair of steps."""
    configs = {
        reward: setup.run_config(
            scratch,
            sizes,
            f"reward={reward}",
            f"algo.steps={sizes.steps}",
            *("checkpoint.every=1", "evaluate.every=0"),
        )
        for reward in ("vanilla", "r2m")
    }
    with cluster(configs["r2m"].cluster):
        rows = asyncio.run(step_time.measure(configs, scratch / "runs"))
    return {
        "passed": True,
        "rows_per_step": sizes.prompts * sizes.group_size,
        "response_tokens": sizes.new_tokens,
        **step_time.compared(rows),
    }
