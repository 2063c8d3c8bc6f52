"""``r2m-ray train``: one run, or one for each combination of several values."""

from __future__ import annotations

from collections.abc import Sequence

from r2m_ray.cli.arguments import OVERRIDES, add_overrides, check, options, parser, run_jobs
from r2m_ray.cli.checks.preflight import preflight
from r2m_ray.config.compose import load_config
from r2m_ray.config.sweep import sweep

SUMMARY = "Train a policy with R2M (or a baseline), and write the run's report."
EXAMPLES = """\
Examples:
  r2m-ray train experiment=demo
  r2m-ray train experiment=demo reward=vanilla run.name=demo-vanilla run.seed=1
  r2m-ray train experiment=demo run.name=demo run.resume=true
  r2m-ray train --multirun experiment=demo reward=vanilla,r2m run.seed=0,1
"""
SUBJECT = "what the run needs"


def run(arguments: Sequence[str]) -> int:
    """Train, and print the run's directory; all runs of a sweep are checked before the first one starts."""
    arg = parser("train", SUMMARY, f"{EXAMPLES}\n{OVERRIDES}\n{options()}")
    add_overrides(arg)
    parsed = arg.parse_intermixed_args(arguments)
    if parsed.multirun:
        jobs = sweep(parsed.overrides)
        check([job.config for job in jobs], preflight, SUBJECT)
        return run_jobs("train", jobs)
    config = load_config(parsed.overrides)
    check([config], preflight, SUBJECT)

    from r2m_ray.runtime.launch import run_training

    print(run_training(config))
    return 0
