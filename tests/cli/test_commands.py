"""The command line: help, exit codes, what it refuses before any engine is loaded, and sweeps."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from r2m_ray import __version__
from r2m_ray.__main__ import COMMANDS, main
from r2m_ray.cli import plan, prepare, train
from r2m_ray.cli.arguments import run_jobs
from r2m_ray.cli.checks.preflight import preflight
from r2m_ray.config.compose import groups
from r2m_ray.config.schema import Config
from r2m_ray.config.sweep import Job, run_in_turn, sweep
from r2m_ray.errors import Alarmed, InputError, Preempted, RunError

FILES = ("task.train_file=org/pairs", "task.eval_file=org/pairs")


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
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: r2m-ray {command} " in text
    assert f"  r2m-ray {command} " in text


def test_training_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name, options in groups().items():
        assert re.search(rf"^  {name} +{' '.join(options)}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "line", re.findall(r"^  r2m-ray (.+)$", train.EXAMPLES + prepare.EXAMPLES + plan.EXAMPLES, re.MULTILINE)
)
def test_documented_command_lines_compose(line: str) -> None:
    arguments = shlex.split(line)
    jobs = sweep([argument for argument in arguments[1:] if not argument.startswith("--")])
    several = {"train": 4, "prepare": 2}
    assert len(jobs) == (several[arguments[0]] if "--multirun" in arguments else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["trian"],
            f"trian: no such command; there are {', '.join(COMMANDS)}. Did you mean train?",
        ),
        (["train", "algo.stepz=3"], "Did you mean algo.steps?"),
        (["train", "reward=vanilla,r2m"], "add --multirun"),
        (["train", "--multirun", "reward=vanilla,r2n"], "Did you mean r2m?"),
        (["prepare", "experiment=dmo"], "Did you mean demo?"),
        (["report", "runs/none"], "runs/none: not the directory of a run"),
        (["evaluate", "runs/none"], "runs/none: not the directory of a run"),
        (
            ["train", "model.policy=/no/model", *FILES, "task=preferences"],
            "model.policy: /no/model: no such directory",
        ),
        (["prepare", "task=preferences", "task.train_file=none.jsonl", FILES[1]], "none.jsonl: no such file"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
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
    with pytest.raises(SystemExit) as stopped:
        main(["train", "experiment=demo", "--resume"])
    assert stopped.value.code == 2
    assert "--resume" in capsys.readouterr().err


def test_the_nearest_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text("run: {name: demo}")
    assert main(["report", str(tmp_path / "dmo")]) == 2
    assert f"Did you mean {tmp_path / 'demo'}?" in capsys.readouterr().err


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
    def fail(arguments: Sequence[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "fail", ("", fail))
    assert main(["fail"]) == code
    assert capsys.readouterr().err.startswith(words)


def test_errors_show_neither_escapes_nor_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: Sequence[str]) -> int:
        raise InputError("\x1b[2Jbad\nWANDB_API_KEY=0123456789")

    monkeypatch.setitem(COMMANDS, "fail", ("", fail))
    assert main(["fail"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: \\x1b[2Jbad\n")
    assert "0123456789" not in text


def test_unforeseen_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Sequence[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "fail", ("", fail))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_a_bad_configuration_ends_a_process_with_two_and_nothing_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "r2m_ray",
            "train",
            "experiment=demo",
            "reward=vanila",
            "algo.temperature=nan",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: 2 problems in the configuration:"
    assert "Did you mean vanilla?" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Sweeps


def exits(*codes: int) -> list[list[str]]:
    return [[sys.executable, "-S", "-c", f"raise SystemExit({code})"] for code in codes]


def test_a_failed_run_does_not_stop_the_sweep() -> None:
    assert run_in_turn(exits(0, 3, 0)) == [0, 3, 0]


@pytest.mark.parametrize("code", [75, 130])
def test_a_run_that_was_told_to_stop_stops_the_sweep(code: int) -> None:
    assert run_in_turn(exits(0, code, 0)) == [0, code]


def test_a_signal_to_the_sweep_ends_its_run_in_order_and_starts_no_other(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n"
        f"open({str(started)!r}, 'a').write('run ')\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.pause()\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert run_in_turn([[sys.executable, "-S", "-c", child]] * 2) == [75]
    assert started.read_text() == "run "
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_killed_by_a_signal_has_a_negative_code() -> None:
    kill = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert run_in_turn([kill, *exits(0)]) == [-9, 0]


def test_each_run_of_a_sweep_is_a_process_whose_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_jobs("prepare", [Job(Config(), ("experiment=dmo",))]) == 3
    assert capsys.readouterr().err == "run: exit code 2\n"


def test_all_runs_of_a_sweep_are_checked_before_the_first_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "runs" / "run-run.seed-1"
    taken.mkdir(parents=True)
    (taken / "config.yaml").touch()
    models = ("model.policy=org/policy", "model.reward=org/reward")
    assert main(["train", "--multirun", "run.seed=0,1", *models]) == 2
    text = capsys.readouterr().err
    assert "1 problem in what the run needs" in text
    assert "runs/run-run.seed-1: holds a run" in text


def test_the_checks_of_a_plain_configuration_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.model.policy, config.model.reward = "org/policy", "org/reward"
    assert preflight(config) == []
    assert list(tmp_path.iterdir()) == []
