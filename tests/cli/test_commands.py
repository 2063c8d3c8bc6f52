"""The command line: help, exit codes, what it refuses before any engine is loaded, and sweeps."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from jobs import record_job

from r2m_ray import __version__
from r2m_ray.__main__ import main
from r2m_ray.cli import commands
from r2m_ray.cli.commands import COMMANDS, Command, objective
from r2m_ray.config.compose import groups
from r2m_ray.config.schema import Config
from r2m_ray.config.sweep import sweep
from r2m_ray.errors import Alarmed, InputError, Preempted, RunError

FILES = ("task.train_file=org/pairs", "task.eval_file=org/pairs")


def exit_code(arguments: list[str]) -> object:
    """Of a command line, whether argparse ends it or the command."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        return stopped.code


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"r2m-ray {__version__}\n"


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: r2m-ray COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: r2m-ray {command} " in text
    assert f"  r2m-ray {command} " in text


def test_training_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, options in groups().items():
        assert re.search(rf"^  {name} +{' '.join(options)}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [
        line
        for name in ("train", "prepare", "plan")
        for line in re.findall(r"^  r2m-ray (.+)$", COMMANDS[name].examples, re.MULTILINE)
    ],
)
def test_documented_command_lines_compose(line: str) -> None:
    arguments = shlex.split(line)
    jobs = sweep([argument for argument in arguments[1:] if not argument.startswith("--")])
    several = {"train": 4, "prepare": 2}
    assert len(jobs) == (several[arguments[0]] if "--multirun" in arguments else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], f"trian: no such command; there are {', '.join(COMMANDS)}. Did you mean train?"),
        (["train", "algo.stepz=3"], "Did you mean algo.steps?"),
        (["train", "reward=vanilla,r2m"], "add --multirun"),
        (["train", "--multirun", "reward=vanilla,r2n"], "Did you mean r2m?"),
        (["prepare", "experiment=dmo"], "Did you mean demo?"),
        (["train", "--cfg", "job", "experiment=dmo"], "Could not find 'experiment/dmo'"),
        (["train", "-m", "hydra/sweeper=optun"], "Did you mean optuna?"),
        (["train", "--experimental-rerun", "job.pickle"], "--experimental-rerun: not taken"),
        (["train", "--config-dir", "conf"], "hydra.searchpath"),
        (["fields", "steppes"], "no field has this in its name"),
        (["report", "runs/none"], "runs/none: not the directory of a run"),
        (["evaluate", "runs/none"], "runs/none: not the directory of a run"),
        (
            ["train", "model.policy=/no/model", *FILES, "task=preferences"],
            "model.policy: /no/model: no such directory",
        ),
        (["prepare", "task=preferences", "task.train_file=none.jsonl", FILES[1]], "none.jsonl: no such file"),
    ],
)
def test_a_mistake_is_reported_without_a_traceback(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_does_not_exist_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["train", "experiment=demo", "--resume"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_the_nearest_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text("run: {name: demo}")
    assert main(["report", str(tmp_path / "dmo")]) == 2
    assert f"Did you mean {tmp_path / 'demo'}?" in capsys.readouterr().err


def add_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A command ``fail`` that raises an error."""

    def fail(arguments: Sequence[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "fail", Command("", "", fail))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("file.yaml: wrong"), 2, "error: file.yaml: wrong"),
        (RunError("policy-0 died"), 3, "error: policy-0 died"),
        (Alarmed("alarm kl at step 9"), 4, "error: alarm kl at step 9"),
        (Preempted("stopped by SIGTERM"), 75, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_failing(monkeypatch, error)
    assert main(["fail"]) == code
    assert capsys.readouterr().err.startswith(words)


def test_errors_show_neither_escapes_nor_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_failing(monkeypatch, InputError("\x1b[2Jbad\nWANDB_API_KEY=0123456789"))
    assert main(["fail"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: \\x1b[2Jbad\n")
    assert "0123456789" not in text


def test_unforeseen_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    add_failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


MISTAKES = [
    "experiment=dem", "reward=vanila", "algo.stepz=3", "omega_floor=0.5", "algo.temperature=nan",
    "algo.responses_per_prompt=1", "policy.learning_rate=-1", "task.overlong=eror", "run.resume=maybe",
    "run.name=../up", "==", "algo.minibatch_prompts=6", "reward.max_grad_norm=inf",
]  # fmt: skip


def test_thirteen_mistakes_of_one_command_are_thirteen_lines_and_nothing_is_written(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "r2m_ray", "train", *MISTAKES]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    first, *rest = done.stderr.splitlines()
    assert first == "error: 13 problems in the configuration:"
    assert len(rest) == len(MISTAKES) == 13
    for mistake in MISTAKES:
        path = mistake.partition("=")[0] or mistake
        assert any(text.strip().startswith(path) for text in rest), mistake
    assert list(tmp_path.iterdir()) == []


# Through hydra


MODELS = ("model.policy=org/policy", "model.reward=org/reward")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that would have been trained, in an empty working directory."""
    configs: list[Config] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_train", configs.append)
    return configs


def test_one_run_leaves_nothing_of_hydras(ran: list[Config], tmp_path: Path) -> None:
    assert main(["train", *MODELS, "rollout.engine_args.seed=3", "+policy.deepspeed.zero=1"]) == 0
    (config,) = ran
    assert (config.run.name, config.rollout.engine_args["seed"]) == ("run", 3)
    assert config.policy.deepspeed == {"zero": 1}
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_grid_is_a_job_for_each_combination_with_a_name_of_its_own(
    ran: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reward=vanilla,r2m", "run.seed=0,1", "algo.steps=3", *MODELS]
    assert main(["train", "-m", *words]) == 0
    assert ran == sweep(words)
    assert [(config.reward.update_steps, config.run.seed) for config in ran] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert "run-reward-r2m-run.seed-1: done" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["multirun"]


@pytest.mark.parametrize(
    ("error", "code", "jobs"), [(RunError("policy-0 died"), 3, 3), (Preempted("stopped by SIGTERM"), 75, 1)]
)
def test_a_failed_job_ends_alone_and_a_stopped_one_ends_the_sweep(
    error: Exception,
    code: int,
    jobs: int,
    ran: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail_first(config: Config) -> None:
        ran.append(config)
        if len(ran) == 1:
            raise error

    monkeypatch.setattr(commands, "_train", fail_first)
    assert main(["train", "-m", "run.seed=0,1,2", *MODELS]) == code
    assert len(ran) == jobs
    assert f"run-run.seed-0: {error}" in capsys.readouterr().err


def test_sigterm_ends_the_job_that_runs_and_those_that_follow(
    ran: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: Config) -> None:
        ran.append(config)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(commands, "_train", stop)
    assert main(["train", "-m", "run.seed=0,1", *MODELS]) == 75
    assert [config.run.seed for config in ran] == [0]
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_search_gets_the_objective_and_names_each_trial(
    ran: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(config: Config) -> float:
        ran.append(config)
        return config.policy.learning_rate

    monkeypatch.setattr(commands, "_train", score)
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=maximize"]
    line = ["train", "-m", *search, "policy.learning_rate=interval(1e-5,1e-3)", "algo.steps=3", *MODELS]
    assert main(line) == 0
    assert len({config.run.name for config in ran}) == 3
    assert all(config.run.name.startswith("run-policy.learning_rate-") for config in ran)
    (results,) = tmp_path.glob("runs/multirun/*/optimization_results.yaml")
    best = float(re.findall(r"best_value: (.+)", results.read_text())[0])
    assert best == max(config.policy.learning_rate for config in ran)


def test_a_launcher_runs_jobs_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_train", record_job)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert main(["train", "-m", *launcher, "run.seed=0,1", *MODELS]) == 0
    processes = {(tmp_path / f"run-run.seed-{seed}.pid").read_text() for seed in (0, 1)}
    assert processes
    assert str(os.getpid()) not in processes


def test_all_runs_of_a_grid_are_checked_before_the_first_starts(
    ran: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "runs" / "run-run.seed-1"
    taken.mkdir(parents=True)
    (taken / "config.yaml").touch()
    assert main(["train", "--multirun", "run.seed=0,1", *MODELS]) == 2
    text = capsys.readouterr().err
    assert "1 problem in what the run needs" in text
    assert "runs/run-run.seed-1: holds a run" in text
    assert ran == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.omega_floor=0.5,0.50"], "is the name of two jobs"),
        (["run.seed=3", "run.seed=0,1"], "run.seed: has one value and several"),
        (["cluster.address=none", "run.seed=0,1"], "cluster.address: none holds one run"),
        (["run.seed=0,1", "+rollout.engine_args.hf_token=hf_canary123456"], "an override holds a secret"),
    ],
)
def test_a_sweep_that_could_not_end_well_does_not_begin(
    words: list[str], message: str, ran: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *words, *MODELS]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "hf_canary" not in text
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_a_mapping_can_be_given_at_once(ran: list[Config]) -> None:
    assert main(["train", "policy.deepspeed={zero_optimization: {stage: 2}}", *MODELS]) == 0
    assert ran[0].policy.deepspeed == {"zero_optimization": {"stage": 2}}


def test_a_job_is_checked_whatever_hydra_is_asked_beside(
    ran: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    for flags in (["-p", "algo"], ["--run"]):
        assert main(["train", *flags, *MODELS]) == 2
        assert "holds a run" in capsys.readouterr().err
    assert ran == []


def test_a_grid_in_a_file_is_checked_and_run(
    ran: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nhydra: {sweeper: {params: {run.seed: '0,1'}}}\n")
    line = ["train", "-m", f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", *MODELS]
    assert main(line) == 0
    assert [config.run.name for config in ran] == ["run-run.seed-0", "run-run.seed-1"]
    file.write_text("# @package _global_\nhydra: {sweeper: {params: {run.seed: '0,-1'}}}\n")
    assert main(line) == 2
    assert "run.seed: -1 is not a whole number ≥ 0" in capsys.readouterr().err
    assert len(ran) == 2


def test_the_configuration_is_shown_with_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "experiment=demo", "algo.steps=2"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["algo"]["steps"], shown["monitor"]["kl"]) == (2, Config().monitor.kl)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("r2m-ray tra", ["train"]),
        ("r2m-ray train algo.prompts", ["algo.prompts_per_shard=", "algo.prompts_per_step="]),
        ("r2m-ray prepare reward=r2m_no_", ["reward=r2m_no_bt", "reward=r2m_no_gre"]),
    ],
)
def test_a_shell_completes_commands_options_and_fields(
    line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert set(words) <= {*capsys.readouterr().out.split()}


def test_the_objective_is_gold_where_it_is_known(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = ['{"step": 0, "kind": "eval", "reward/frozen_mean": 1.0}']
    file.write_text("\n".join([*rows, ""]))
    assert objective(file) == 1.0
    rows += [
        '{"step": 2, "kind": "eval", "reward/frozen_mean": 2.0, "gold/mean": 0.5}',
        '{"step": 2, "kind": "step"}',
    ]
    file.write_text("\n".join([*rows, ""]))
    assert objective(file) == 0.5
