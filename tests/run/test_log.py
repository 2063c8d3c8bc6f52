"""The run log on a real disk, and what it shows on a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import sys
from contextlib import closing
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.errors import InputError, RunError, printable
from r2m_ray.run.environment import environment
from r2m_ray.run.files import StepLines, read_steps
from r2m_ray.run.log import RunLog
from r2m_ray.run.progress import PhaseClock, RunProgress, number, sparkline
from r2m_ray.run.vocabulary import MACHINE_PREFIXES


def run_log(
    directory: Path, *, resume: bool = False, name: str = "tiny", console: Console | None = None
) -> RunLog:
    config = Config()
    config.run.name, config.run.resume, config.algo.steps = name, resume, 4
    config.logging.wandb = WandbMode.disabled
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return RunLog(
        directory, config=config, resolved_yaml=text, console=console or Console(file=io.StringIO())
    )


def write(log: RunLog, steps: range) -> None:
    for t in steps:
        with log.phase("sample"):
            pass
        log.step(t, {"reward/mean": 0.1 * t, "omega": 1.0}, [{"step": t, "response": f"row {t}"}])
        log.evaluation(t, {"reward/mean": 0.2 * t})


def lines(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(MACHINE_PREFIXES)} for record in records]


class TestAStartThatFails:
    def test_a_new_run_leaves_its_name_free(self, tmp_path: Path):
        with pytest.raises(InputError), run_log(tmp_path / "run"):
            raise InputError("rollout.engine_args: no such option")
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_run_that_began_keeps_its_files(self, tmp_path: Path):
        def dies() -> None:
            with run_log(tmp_path / "run") as log:
                log.rewind(0)
                write(log, range(1, 2))
                raise RunError("policy-0 died")

        with pytest.raises(RunError):
            dies()
        assert [row["step"] for row in read_steps(tmp_path / "run" / "metrics.jsonl")] == [1, 1]

    def test_a_run_that_resumes_keeps_its_files(self, tmp_path: Path):
        with run_log(tmp_path / "run") as log:
            log.rewind(0)
            write(log, range(1, 2))
        with pytest.raises(InputError), run_log(tmp_path / "run", resume=True):
            raise InputError("model.policy: gone")
        assert (tmp_path / "run" / "config.yaml").exists()


class TestFiles:
    def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(self, tmp_path: Path):
        with run_log(tmp_path / "uncut") as log:
            log.rewind(0)
            write(log, range(1, 5))
        with run_log(tmp_path / "cut") as log:
            log.rewind(0)
            write(log, range(1, 4))
        with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 4, "kind": "st')
        with run_log(tmp_path / "cut", resume=True) as log:
            log.rewind(2)
            assert [row["step"] for row in lines(tmp_path / "cut" / "metrics.jsonl")] == [1, 1, 2, 2]
            write(log, range(3, 5))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            assert lines(tmp_path / "cut" / name) == lines(tmp_path / "uncut" / name)
        starts = json.loads((tmp_path / "cut" / "environment.json").read_text())["starts"]
        assert [start["python"] for start in starts] == [sys.version.split()[0]] * 2

    def test_the_rows_so_far_are_read_back_as_they_were_written(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            log.rewind(0)
            assert log.rows("step") == []
            log.evaluation(0, {"reward/mean": 0.5})
            for t in range(1, 4):
                log.step(t, {"reward/mean": t / 3, "policy/kl_sequence": math.nan})
        with run_log(tmp_path, resume=True) as log:
            log.rewind(2)
            rows = log.rows("step")
            assert [row["step"] for row in rows] == [1, 2]
            assert [row["reward/mean"] for row in rows] == [1 / 3, 2 / 3]
            assert [row["policy/kl_sequence"] for row in rows] == [None, None]
            assert [(row["step"], row["reward/mean"]) for row in log.rows("eval")] == [(0, 0.5)]

    def test_rows_of_an_earlier_version_have_todays_names(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            log.evaluation(0, {"reward": 0.5, "rm_accuracy_style_frozen": 0.7})
            (row,) = log.rows("eval")
        assert row == {
            "step": 0,
            "kind": "eval",
            "reward/mean": 0.5,
            "pairs/frozen_style_accuracy": 0.7,
            "nonfinite": 0,
        }

    def test_the_configuration_is_that_of_the_latest_start(self, tmp_path: Path):
        for name in ("a", "b"):
            with run_log(tmp_path, resume=True, name=name):
                pass
        assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["config.yaml"]
        assert OmegaConf.load(tmp_path / "config.yaml").run.name == "b"

    def test_rewinding_to_the_start_also_forgets_the_evaluation_before_it(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            log.evaluation(0, {"reward/mean": 1.0})
            log.rewind(0)
            log.evaluation(0, {"reward/mean": 2.0})
        assert [row["reward/mean"] for row in lines(tmp_path / "metrics.jsonl")] == [2.0]

    def test_rows_carry_their_kind_and_the_times_of_their_phases(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            with log.phase("sample"), log.phase("sync"):
                pass
            log.step(1, {"omega": 1.0})
            with log.phase("evaluate"):
                pass
            log.evaluation(1, {"reward/mean": 0.0})
        step, evaluation = read_steps(tmp_path / "metrics.jsonl")
        assert step["kind"] == "step"
        assert {key for key in step if key.startswith("time/")} == {"time/sample", "time/sync", "time/step"}
        assert evaluation["kind"] == "eval"
        assert {key for key in evaluation if key.startswith("time/")} == {"time/evaluate"}

    def test_a_step_after_a_recovery_has_no_time_of_the_lost_attempt(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            with log.phase("start"):
                pass
            with log.phase("sample"), log.phase("annotate"):
                pass
            log.rewind(0)
            with log.phase("sample"):
                pass
            log.step(1, {"omega": 1.0})
        (row,) = read_steps(tmp_path / "metrics.jsonl")
        assert {key for key in row if key.startswith("time/")} == {"time/start", "time/sample", "time/step"}
        assert row["time/step"] == pytest.approx(row["time/sample"])

    def test_numbers_that_are_not_finite_become_null_and_are_counted(self, tmp_path: Path):
        with run_log(tmp_path) as log:
            log.step(
                1, {"a": math.nan, "b": math.inf, "c": 1.0}, [{"step": 1, "gold_parts": {"x": math.nan}}]
            )
        row = lines(tmp_path / "metrics.jsonl")[0]
        assert (row["a"], row["b"], row["c"], row["nonfinite"]) == (None, None, 1.0, 2)
        assert lines(tmp_path / "rollouts.jsonl")[0] == {"step": 1, "gold_parts": {"x": None}, "nonfinite": 1}

    def test_any_text_survives_the_file(self, tmp_path: Path):
        text = "狐\u2028\x1b[2J\x00\ud800\nend"
        with run_log(tmp_path) as log:
            log.step(1, {}, [{"step": 1, "response": text}])
        assert read_steps(tmp_path / "rollouts.jsonl")[0]["response"] == text

    def test_an_existing_run_is_not_overwritten(self, tmp_path: Path):
        with run_log(tmp_path):
            pass
        with pytest.raises(InputError, match=r"run\.resume=true"):
            run_log(tmp_path)

    def test_a_full_disk_names_the_file_and_keeps_complete_lines(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with closing(StepLines(path)) as file:
            file.append([{"step": 1}])
            complete = path.read_bytes()
            # The kernel writes up to the limit and then refuses, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(complete) + 10, limits[1]))
            try:
                with pytest.raises(
                    RunError, match=r"metrics\.jsonl: cannot append \d+ bytes.*run\.resume=true"
                ):
                    file.append([{"step": 2, "text": "x" * 100}])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == complete

    def test_a_broken_line_is_named(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
            read_steps(path)
        path.write_text('{"step": "one"}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:1: not an object with an integer step"):
            read_steps(path)

    def test_an_unusable_directory_is_named(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="file/run"), run_log(tmp_path / "file" / "run"):
            pass


class TestEnvironment:
    def test_it_names_the_versions_that_made_the_numbers(self):
        found = environment()
        assert found["packages"]["torch"] == __import__("torch").__version__
        assert found["cores"] == len(os.sched_getaffinity(0))


class TestTerminal:
    def test_without_a_terminal_there_is_one_line_per_step(self, tmp_path: Path):
        stream, now = io.StringIO(), 0.0
        with run_log(tmp_path, console=Console(file=stream, width=40, get_time=lambda: now)) as log:
            log.step(1, {"reward/mean": 1.23456, "gold/mean": math.nan, "omega": 0.5})
            now = 2000.0
            log.step(2, {"reward/mean": 2.0, "omega": 0.5})
            log.evaluation(2, {"gold/mean": 3.0, "kl/sequence": 4.0, "pairs/accuracy": 0.75})
            log.rewind(1)
            log.step(2, {"omega": 0.5})
            now = 2060.0
            log.step(3, {"omega": 0.5})
        assert stream.getvalue().splitlines() == [
            "step 1/4  own 1.23  gold nan  ω 0.5  left ?",
            "step 2/4  own 2  ω 0.5  left 1:06:40",
            "evaluation after step 2  gold 3  KL/row 4  RM accuracy 0.75",
            "step 2/4  ω 0.5  left ?",
            "step 3/4  ω 0.5  left 0:01:00",
        ]

    def test_on_a_terminal_the_panel_shows_the_step_and_the_running_phase(self):
        now = 0.0
        console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, get_time=lambda: now)
        clock = PhaseClock()
        view = RunProgress(console, name="tiny", steps=4, clock=clock)
        row = {"time/sample": 1.25, "time/step": 2.0, "response/tokens": 3000.0}
        view.step(1, {"reward/mean": 0.5, **row})
        now = 30.0
        view.step(2, {"reward/mean": 1.5, **row})
        page = Console(file=io.StringIO(), width=100)
        with clock.phase("policy"):
            page.print(view.panel())
        view.close()
        shown = page.file.getvalue()
        assert "step 2/4" in shown
        assert "left 0:01:00" in shown
        assert "▶ policy" in shown
        assert "sample 1.25s" in shown
        assert re.search(r"own\s+tokens/s", shown)
        assert re.search(r"1\.5\s+1,500", shown)
        assert "own ▁█" in shown

    def test_the_panel_is_what_a_terminal_gets(self, tmp_path: Path):
        stream = io.StringIO()
        with run_log(
            tmp_path, console=Console(file=stream, force_terminal=True, width=100, height=40)
        ) as log:
            write(log, range(1, 3))
        assert "step 2/4" in stream.getvalue()

    @pytest.mark.parametrize("terminal", [True, False])
    def test_control_characters_never_reach_the_terminal(self, tmp_path: Path, terminal: bool):
        stream = io.StringIO()
        with run_log(tmp_path, console=Console(file=stream, force_terminal=terminal, width=100)) as log:
            log.message("\x1b[2Jgone \x07 [red]markup[/red] \u202egnp")
        assert "\\x1b[2Jgone \\x07 [red]markup[/red] \\u202egnp" in stream.getvalue()
        assert "\x1b[2J" not in stream.getvalue()
        assert "\x07" not in stream.getvalue()

    def test_printable_keeps_ordinary_text_of_any_language(self):
        assert printable("naïve 狐 🦊 [x]") == "naïve 狐 🦊 [x]"
        assert printable("a\nb\tc", lines=True) == "a\nb\tc"
        assert printable("a\nb\r\ud800\u200b\U000e0001") == "a\\x0ab\\x0d\\ud800\\u200b\\U000e0001"

    def test_small_things_read_well(self):
        assert [number(x) for x in (0.012345, -3.14159, 1234.5, 0.0)] == ["0.0123", "-3.14", "1,234", "0"]
        assert sparkline([0.0, math.nan, 1.0]) == "▁ █"
        assert sparkline([2.0, 2.0]) == "▁▁"


class TestPhaseClock:
    def test_overlapping_phases_count_fully_and_the_step_spans_them(self, monkeypatch: pytest.MonkeyPatch):
        now = iter([0.0, 3.0, 10.0, 11.0, 14.0, 16.0, 20.0, 25.0])
        monkeypatch.setattr("r2m_ray.run.progress.time.monotonic", lambda: next(now))
        clock = PhaseClock()
        with clock.phase("sample"):  # 0 … 3
            pass
        with clock.phase("reward"), clock.phase("sync"):  # 10 … 16, 11 … 14
            assert set(clock.running) == {"reward", "sync"}
        with clock.phase("evaluate"):  # 20 … 25
            pass
        assert clock.collect() == {
            "time/sample": 3.0,
            "time/reward": 6.0,
            "time/sync": 3.0,
            "time/evaluate": 5.0,
            "time/step": 16.0,
        }
        assert clock.collect() == {}
