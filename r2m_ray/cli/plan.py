"""``r2m-ray plan``: batch arithmetic, memory and placement of a configuration, without starting it."""

from __future__ import annotations

from collections.abc import Sequence

from r2m_ray.cli.arguments import OVERRIDES, options, parser
from r2m_ray.config.compose import load_config

SUMMARY = "Work out the batches of a run and the memory of each of its actors, without starting anything."
EXAMPLES = """\
Examples:
  r2m-ray plan experiment=demo
  r2m-ray plan experiment=dialogue_llama3_8b model.policy=/models/policy model.reward=/models/reward
  r2m-ray plan experiment=demo --json

Sizes come from each model's config.json, of a directory, the local cache or the hub; no weights are read.
Memory is an estimate from above: rows of full length, every slot of the KV cache used.
"""


def run(arguments: Sequence[str]) -> int:
    """Print the plan."""
    arg = parser("plan", SUMMARY, f"{EXAMPLES}\n{OVERRIDES}\n{options()}")
    arg.add_argument("overrides", nargs="*", help="options and fields, as below")
    arg.add_argument("--json", action="store_true", help="one JSON object, all sizes in bytes")
    parsed = arg.parse_intermixed_args(arguments)
    config = load_config(parsed.overrides)

    # transformers takes seconds to import, and a mistake above is reported without it.
    from r2m_ray.cli.checks.plan import plan, show

    show(plan(config), config, as_json=parsed.json)
    return 0
