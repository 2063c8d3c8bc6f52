"""``r2m-ray prepare``: the small models that a configuration trains from scratch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from r2m_ray.cli.arguments import OVERRIDES, add_overrides, check, options, parser, run_jobs
from r2m_ray.cli.checks.preflight import data_problems
from r2m_ray.config.compose import load_config
from r2m_ray.config.sweep import sweep

SUMMARY = "Make the tokenizer, policy and reward model of a configuration whose models are `prepared`."
EXAMPLES = """\
Examples:
  r2m-ray prepare experiment=demo
  r2m-ray prepare --multirun experiment=demo run.seed=0,1
  r2m-ray prepare experiment=preferences_tiny task.train_file=train.jsonl task.eval_file=eval.jsonl

Models are kept under prepare.root by a digest of what went into them, so the same configuration finds
them again.
"""
SUBJECT = "the data"


def run(arguments: Sequence[str]) -> int:
    """Prepare models; nothing is done where they exist already."""
    arg = parser("prepare", SUMMARY, f"{EXAMPLES}\n{OVERRIDES}\n{options()}")
    add_overrides(arg)
    parsed = arg.parse_intermixed_args(arguments)
    if parsed.multirun:
        jobs = sweep(parsed.overrides)
        check([job.config for job in jobs], data_problems, SUBJECT)
        return run_jobs("prepare", jobs)
    config = load_config(parsed.overrides)
    check([config], data_problems, SUBJECT)

    # Threads that spin while they wait make training several times slower where another process is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from r2m_ray.tasks.prepare.store import prepare

    prepare(config)
    return 0
