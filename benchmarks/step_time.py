"""What R2M costs a training step: the whole real loop, vanilla and R2M taking turns step by step.

Both sides run in one Ray cluster, each with its own four roles, on the same prompts; a side works only
while it is its turn. Compare with the paper's 4.5 h / 4.4 h = 1.02 for LLaMA3-8B.

    python benchmarks/step_time.py [--steps 12] [--out step_time.json] [hydra overrides]

Needs the demo's models: `r2m-ray prepare experiment=demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import machine, summary, write
from transformers import AutoTokenizer

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Config
from r2m_ray.core.roles import Roles
from r2m_ray.driver.human_pairs import HumanPairs
from r2m_ray.driver.loop import train
from r2m_ray.run.files import METRICS_FILE, read_steps
from r2m_ray.run.log import RunLog
from r2m_ray.run.stop import StopRequest
from r2m_ray.runtime.cluster import cluster
from r2m_ray.runtime.placement import Placement
from r2m_ray.runtime.start import Crew
from r2m_ray.tasks.data import PromptOrder
from r2m_ray.tasks.models import Models
from r2m_ray.tasks.task import load_task

WARM_UP_STEPS = 2


class Turns:
    """Lets one side work at a time, a step each, in order."""

    def __init__(self, sides: int) -> None:
        self._turn = 0
        self._sides = sides
        self._changed = asyncio.Condition()

    async def wait(self, side: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._turn % self._sides == side)

    async def over(self) -> None:
        async with self._changed:
            self._turn += 1
            self._changed.notify_all()


class Side:
    """Checkpoints that save nothing and hand over the turn, and an evaluator that measures nothing."""

    def __init__(self, index: int, turns: Turns) -> None:
        self._index = index
        self._turns = turns

    async def measure(self) -> dict[str, float]:
        """No evaluation: it is the same on both sides."""
        return {}

    async def restore(self, roles: Roles) -> int:
        await self._turns.wait(self._index)
        return 0

    async def save(self, step: int, roles: Roles) -> None:
        await self._turns.over()
        await self._turns.wait(self._index)


async def measure(configs: dict[str, Config], root: Path) -> dict[str, list[dict[str, float]]]:
    turns = Turns(len(configs))
    placements, runs = [], []
    with ExitStack() as stack:
        for index, (name, config) in enumerate(configs.items()):
            placements.append(Placement(config))
            stack.callback(placements[-1].release)
            models = Models.of(config)
            roles = await Crew(config, models, placements[-1], print).start()
            side: Any = Side(index, turns)
            tokenizer = AutoTokenizer.from_pretrained(models.policy)
            task = load_task(config, tokenizer)
            order = PromptOrder(
                task.train_prompts, seed=config.run.seed, per_step=config.algo.prompts_per_step
            )
            log = stack.enter_context(RunLog(root / name, config=config, resolved_yaml=""))
            stop = StopRequest(config.cluster.stop_grace_s)
            human = HumanPairs(config, roles, pairs=task.train_pairs, tokenizer=tokenizer, log=log)
            runs.append(train(config, roles, order, human, side, side, log, stop))
        await asyncio.gather(*[_finish(run, turns) for run in runs])
    rows = {name: [*read_steps(root / name / METRICS_FILE)] for name in configs}
    return {
        name: [row for row in found if row["kind"] == "step"][WARM_UP_STEPS:] for name, found in rows.items()
    }


async def _finish(run: Any, turns: Turns) -> None:
    await run
    await turns.over()


def compared(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Seconds of each phase of both sides, and R2M's step over vanilla's."""
    phases = sorted(key for key in rows["r2m"][0] if key.startswith("time/"))
    seconds = {
        side: {phase: summary([row[phase] for row in found]) for phase in phases}
        for side, found in rows.items()
    }
    return {
        "seconds": seconds,
        "step_ratio_r2m_over_vanilla": seconds["r2m"]["time/step"]["median"]
        / seconds["vanilla"]["time/step"]["median"],
        "step_ratio_by_pair": summary(
            [r["time/step"] / v["time/step"] for r, v in zip(rows["r2m"], rows["vanilla"], strict=True)]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each side, the first two unmeasured")
    parser.add_argument("--out", type=Path, default=Path("step_time.json"))
    arguments, overrides = parser.parse_known_args()
    common = [
        "experiment=demo",
        f"algo.steps={arguments.steps}",
        "checkpoint.every=1",
        "evaluate.every=0",
        "logging=disabled",
        "cluster.cpus=4",
        *overrides,
    ]
    configs = {name: load_config([*common, f"reward={name}"]) for name in ("vanilla", "r2m")}
    with cluster(configs["r2m"].cluster), tempfile.TemporaryDirectory() as root:
        rows = asyncio.run(measure(configs, Path(root)))
    result = {
        "benchmark": "step_time",
        "machine": machine(),
        "overrides": overrides,
        **compared(rows),
    }
    write(arguments.out, result)
    print(f"R2M / vanilla: {result['step_ratio_r2m_over_vanilla']:.3f}  →  {arguments.out}")


if __name__ == "__main__":
    main()
