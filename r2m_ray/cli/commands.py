"""The commands: their arguments, and what each checks before it loads an engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r2m_ray.cli.checks.preflight import data_problems, evaluation_problems, preflight
from r2m_ray.cli.hydra_main import Work, check, through_hydra
from r2m_ray.config.compose import groups, load_config, load_saved
from r2m_ray.config.fields import reference
from r2m_ray.config.schema import Config, RunConfig
from r2m_ray.errors import InputError, RunError, hint, printable
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints, export, fault, step_of
from r2m_ray.run.files import CONFIG_FILE, METRICS_FILE, read_metrics

OVERRIDES = """\
Overrides choose options and set fields, in hydra's grammar:
  experiment=demo                               an option of a group of conf/
  algo.steps=200                                a field; `r2m-ray fields` explains each
  +policy.deepspeed.wall_clock_breakdown=true   a key that DeepSpeed (or vLLM) knows
  hydra.searchpath=[file:///my/conf]            options of your own: /my/conf/experiment/mine.yaml
"""


@dataclass(frozen=True, slots=True)
class Command:
    """One line about a command, its examples, and the function that takes its arguments."""

    summary: str
    examples: str
    run: Callable[[Sequence[str]], int]


def train(arguments: Sequence[str]) -> int:
    """Train, and print the run's directory; all runs of a grid are checked before the first one starts."""
    return through_hydra("train", arguments, Work(_help("train"), "what the run needs", preflight, _train))


def prepare(arguments: Sequence[str]) -> int:
    """Prepare models; nothing is done where they exist already."""
    return through_hydra("prepare", arguments, Work(_help("prepare"), "the data", data_problems, _prepare))


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate; the numbers are shown and kept with the run."""
    arg = _parser("evaluate")
    _add_run_dir(arg)
    arg.add_argument("overrides", nargs="*", help="fields to change, such as evaluate.prompts=256")
    parsed = arg.parse_args(arguments)
    directory = run_directory(parsed.run_dir)
    config = load_saved(directory / CONFIG_FILE, parsed.overrides)
    check([config], evaluation_problems, "what the evaluation needs")

    from r2m_ray.runtime.launch import run_evaluation

    path = run_evaluation(config, directory)
    print(path.read_text(), end="")
    print(path)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write the report and print its path."""
    arg = _parser("report")
    _add_run_dir(arg)
    directory = run_directory(arg.parse_args(arguments).run_dir)

    from r2m_ray.report.run_page import write_report

    print(write_report(directory))
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Compare, and print the page's path."""
    arg = _parser("compare")
    arg.add_argument(
        "arms", nargs="+", metavar="ARM=RUN_DIR[,RUN_DIR…]", help="name of an arm, and its run of every seed"
    )
    arg.add_argument("--baseline", required=True, metavar="ARM", help="the arm to compare the others with")
    arg.add_argument("--out", default="comparison", metavar="DIR", help="where to write (comparison)")
    parsed = arg.parse_args(arguments)
    runs: dict[str, list[Path]] = {}
    for word in parsed.arms:
        arm, separator, directories = word.partition("=")
        if not (arm and separator and directories):
            raise InputError(f"{printable(word)}: not ARM=RUN_DIR, such as vanilla=runs/v0,runs/v1")
        runs.setdefault(arm, []).extend(run_directory(text) for text in directories.split(","))

    # matplotlib takes seconds to import, and a mistake above is reported without it.
    from r2m_ray.report.compare.compare import write_comparison

    print(write_comparison(runs, parsed.baseline, Path(parsed.out)))
    return 0


def checkpoint(arguments: Sequence[str]) -> int:
    """Verify or export; 0, or RunError where a checkpoint that is asked for is damaged."""
    arg = _parser("checkpoint")
    actions = arg.add_subparsers(dest="action", required=True, metavar="verify | export")
    summary = "compare every file with its manifest, by size and sha256"
    verify = actions.add_parser("verify", help=summary, description=summary)
    summary = "copy the policy (Hugging Face format) and the R2M head of a checkpoint that verifies"
    exported = actions.add_parser("export", help=summary, description=summary)
    for action in (verify, exported):
        _add_run_dir(action)
    verify.add_argument("step", metavar="STEP", type=int, nargs="?", help="one step; all if left out")
    exported.add_argument("out_dir", metavar="OUT_DIR", help="directory to make; it may not exist")
    exported.add_argument("--step", type=int, help="one step; the newest that verifies if left out")
    parsed = arg.parse_args(arguments)
    directory = run_directory(parsed.run_dir) / CHECKPOINTS
    chosen = _checkpoints(directory, parsed.step)
    if parsed.action == "verify":
        _verify(chosen)
        return 0
    newest = chosen[0] if parsed.step is not None else Checkpoints(directory, keep=1).newest()
    assert newest is not None
    export(newest, Path(parsed.out_dir))
    print(parsed.out_dir)
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Print the plan."""
    arg = _parser("plan", f"{OVERRIDES}\n{options()}")
    arg.add_argument("overrides", nargs="*", help="options and fields, as below")
    arg.add_argument("--json", action="store_true", help="one JSON object, all sizes in bytes")
    parsed = arg.parse_intermixed_args(arguments)
    config = load_config(parsed.overrides)

    # transformers takes seconds to import, and a mistake above is reported without it.
    from r2m_ray.cli.checks.plan import plan, show

    show(plan(config), config, as_json=parsed.json)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Examine, print every check, and return 3 if one failed."""
    arg = _parser("doctor")
    arg.add_argument("root", nargs="?", metavar="run.root=DIR", help="where runs will be written")
    arg.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parsed = arg.parse_args(arguments)
    name, _, root = (parsed.root or f"run.root={RunConfig().root}").partition("=")
    if name != "run.root" or not root:
        raise InputError(f"{parsed.root}: doctor takes run.root=DIR alone, such as run.root=/data/runs")

    # torch takes seconds to import, and a mistake above is reported without it.
    from r2m_ray.cli.checks.doctor import diagnose

    return diagnose(Path(root), as_json=parsed.json)


def fields(arguments: Sequence[str]) -> int:
    """Print the reference of the fields."""
    arg = _parser("fields")
    arg.add_argument("word", nargs="?", default="", metavar="WORD", help="a part of the fields' names")
    word = arg.parse_args(arguments).word
    text = reference(word)
    if not text:
        raise InputError(f"{printable(word)}: no field has this in its name; `r2m-ray fields` lists all")
    print(text, end="")
    return 0


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "Make the tokenizer, policy and reward model of a configuration whose models are `prepared`.",
        """\
  r2m-ray prepare experiment=demo
  r2m-ray prepare --multirun experiment=demo run.seed=0,1
  r2m-ray prepare experiment=preferences_tiny task.train_file=train.jsonl task.eval_file=eval.jsonl

Models are kept under prepare.root by a digest of what went into them, so the same configuration finds
them again.
""",
        prepare,
    ),
    "train": Command(
        "Train a policy with R2M (or a baseline), and write the run's report.",
        """\
  r2m-ray train experiment=demo
  r2m-ray train experiment=demo reward=vanilla run.name=demo-vanilla run.seed=1
  r2m-ray train experiment=demo run.name=demo run.resume=true
  r2m-ray train --multirun experiment=demo reward=vanilla,r2m run.seed=0,1
""",
        train,
    ),
    "evaluate": Command(
        "Evaluate the newest checkpoint of a run on the task's held-out prompts and pairs.",
        """\
  r2m-ray evaluate runs/demo
  r2m-ray evaluate runs/demo evaluate.prompts=256 evaluate.pairs=512

The run's own configuration is used; overrides set single fields of it.
""",
        evaluate,
    ),
    "report": Command(
        "Write the report of a run from its files; also works while the run goes on.",
        "  r2m-ray report runs/demo\n",
        report,
    ),
    "compare": Command(
        "Compare finished runs of several arms: gold at matched KL, or what can be said without gold.",
        """\
  r2m-ray compare vanilla=runs/v0,runs/v1 r2m=runs/r0,runs/r1 --baseline vanilla
  r2m-ray compare vanilla=runs/v0 r2m=runs/r0 anchor=runs/a0 --baseline vanilla --out comparison

Arms are paired by run.seed; every run has the same task, prepared models, budget and evaluation. Writes
comparison.md, comparison.json, pictures and comparison.html.
""",
        compare,
    ),
    "checkpoint": Command(
        "Verify the checkpoints of a run, or export the models of one.",
        """\
  r2m-ray checkpoint verify runs/demo
  r2m-ray checkpoint verify runs/demo 20
  r2m-ray checkpoint export runs/demo models/demo --step 20
""",
        checkpoint,
    ),
    "plan": Command(
        "Work out the batches of a run and the memory of each of its actors, without starting anything.",
        """\
  r2m-ray plan experiment=demo
  r2m-ray plan experiment=dialogue_llama3_8b model.policy=/models/policy model.reward=/models/reward
  r2m-ray plan experiment=demo --json

Sizes come from each model's config.json, of a directory, the local cache or the hub; no weights are read.
Memory is an estimate from above: rows of full length, every slot of the KV cache used.
""",
        plan,
    ),
    "doctor": Command(
        "Check this machine: packages, engines, cores, memory, disk, GPUs, a 2-rank collective.",
        """\
  r2m-ray doctor
  r2m-ray doctor run.root=/data/runs --json

Takes up to a minute; nothing is left behind. Exit codes: 0 nothing failed, 3 something did.
""",
        doctor,
    ),
    "fields": Command(
        "Explain the fields of the configuration: values, default, meaning, and what each decides.",
        "  r2m-ray fields\n  r2m-ray fields reward.\n",
        fields,
    ),
}


def options() -> str:
    """The configuration groups and their options, one group per line."""
    width = max(map(len, groups()))
    lines = [f"  {name:<{width}}  {' '.join(choices)}" for name, choices in groups().items()]
    return "\n".join(["Groups and their options:", *lines])


def run_directory(text: str) -> Path:
    """The directory of an existing run; InputError names the nearest one where there is none."""
    path = Path(text)
    if (path / CONFIG_FILE).is_file():
        return path
    runs = [str(file.parent) for file in path.parent.glob(f"*/{CONFIG_FILE}")]
    remedy = hint(str(path), runs) or " Give one, such as runs/demo."
    raise InputError(f"{printable(text)}: not the directory of a run (no {CONFIG_FILE} in it).{remedy}")


def _train(config: Config) -> float | None:
    from r2m_ray.runtime.launch import run_training

    directory = run_training(config)
    print(directory)
    return objective(directory / METRICS_FILE)


def objective(file: Path) -> float | None:
    """What a search sees of a run: gold/mean of the last evaluation, or reward/frozen_mean without gold."""
    rows = [row for row in read_metrics(file) if row["kind"] == "eval"]
    last: Mapping[str, float | None] = rows[-1] if rows else {}
    return last["gold/mean"] if "gold/mean" in last else last.get("reward/frozen_mean")


def _prepare(config: Config) -> None:
    # Threads that spin while they wait make training several times slower where another process is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from r2m_ray.tasks.prepare.store import prepare

    prepare(config)


def _help(command: str) -> str:
    about = COMMANDS[command]
    return f"{about.summary}\n\nExamples:\n{about.examples}\n{OVERRIDES}\n{options()}\n"


def _parser(command: str, more: str = "") -> argparse.ArgumentParser:
    """An argument parser whose help keeps the examples' line breaks."""
    about = COMMANDS[command]
    return argparse.ArgumentParser(
        prog=f"r2m-ray {command}",
        description=about.summary,
        epilog=f"Examples:\n{about.examples}\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_run_dir(arg: argparse.ArgumentParser) -> None:
    arg.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run, such as runs/demo")


def _verify(checkpoints: Sequence[Path]) -> None:
    """Print each valid checkpoint with its size; RunError names every damaged one, its file and the fault."""
    damaged = []
    for path in checkpoints:
        if reason := fault(path):
            damaged.append(f"{path}: {reason}")
            continue
        print(f"{path}: valid, {commit.read_manifest(path).bytes:,} bytes")
        for name in commit.unlisted(path):
            print(f"{path}: {printable(name)} is not part of the checkpoint, and never read")
    if damaged:
        raise RunError("\n".join(damaged))


def _checkpoints(directory: Path, step: int | None) -> list[Path]:
    """The checkpoints of a run, oldest first, or that of one step; InputError where there is none."""
    found = Checkpoints(directory, keep=1).committed()
    if not found:
        raise InputError(f"{directory}: no checkpoint; the run has not committed one yet")
    chosen = [path for path in found if step in (None, step_of(path))]
    if not chosen:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise InputError(f"{directory}: no checkpoint of step {step}; there are those of {steps}")
    return chosen
