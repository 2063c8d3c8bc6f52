"""``r2m-ray evaluate``: a finished run, measured again on held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from r2m_ray.cli.arguments import check, parser, run_directory
from r2m_ray.cli.checks.preflight import (
    data_problems,
    exposure_problems,
    model_problems,
    store_problems,
)
from r2m_ray.config.compose import load_saved
from r2m_ray.config.schema import Config
from r2m_ray.errors import Problem
from r2m_ray.run.files import CONFIG_FILE

SUMMARY = "Evaluate the newest checkpoint of a run on the task's held-out prompts and pairs."
EXAMPLES = """\
Examples:
  r2m-ray evaluate runs/demo
  r2m-ray evaluate runs/demo evaluate.prompts=256 evaluate.pairs=512

The run's own configuration is used; overrides set single fields of it.
"""


def _problems(config: Config) -> list[Problem]:
    return [
        *model_problems(config),
        *data_problems(config),
        *exposure_problems(config.cluster),
        *store_problems(config.cluster),
    ]


def run(arguments: Sequence[str]) -> int:
    """Evaluate; the numbers are shown and kept with the run."""
    arg = parser("evaluate", SUMMARY, EXAMPLES)
    arg.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, such as runs/demo")
    arg.add_argument("overrides", nargs="*", help="fields to change, such as evaluate.prompts=256")
    parsed = arg.parse_args(arguments)
    directory = run_directory(parsed.run_dir)
    config = load_saved(directory / CONFIG_FILE, parsed.overrides)
    check([config], _problems, "what the evaluation needs")

    from r2m_ray.runtime.launch import run_evaluation

    path = run_evaluation(config, directory)
    print(path.read_text(), end="")
    print(path)
    return 0
