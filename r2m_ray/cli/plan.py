"""``r2m-ray plan``: batch arithmetic and memory of a configuration, without starting it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from r2m_ray.cli.arguments import OVERRIDES, options, parser
from r2m_ray.config.compose import load_config
from r2m_ray.errors import printable

SUMMARY = "Work out the batches of a run and the memory of each of its actors, without starting anything."
EXAMPLES = """\
Examples:
  r2m-ray plan experiment=demo
  r2m-ray plan experiment=dialogue_llama3_8b model.policy=/models/policy model.reward=/models/reward
  r2m-ray plan experiment=demo --json

Sizes come from each model's config.json; no weights are read. Memory is an estimate from above: rows of full
length, every slot of the KV cache used.
"""


def run(arguments: Sequence[str]) -> int:
    """Print the plan."""
    arg = parser("plan", SUMMARY, f"{EXAMPLES}\n{OVERRIDES}\n{options()}")
    arg.add_argument("overrides", nargs="*", help="options and fields, as below")
    arg.add_argument("--json", action="store_true", help="one JSON object, all sizes in bytes")
    parsed = arg.parse_intermixed_args(arguments)
    config = load_config(parsed.overrides)

    # transformers takes seconds to import, and a mistake above is told without it.
    from r2m_ray.cli.checks.plan import plan
    from r2m_ray.cli.checks.plan_tables import batch_table, memory_table, memory_total, traffic_table

    found = plan(config)
    if parsed.json:
        print(json.dumps(found.document(), indent=2))
        return 0
    console = Console(highlight=False)
    console.print(batch_table(found))
    if found.actors:
        console.print(memory_table(found), memory_total(found))
    console.print(traffic_table(found))
    for problem in found.warnings:
        refused = "" if problem.warning else "train will not start: "
        console.print(printable(f"warning: {refused}{problem}"), markup=False, soft_wrap=True)
    return 0
