"""Preflight: data files and the run directory are examined before Ray starts."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from told import only

from r2m_ray.cli.checks.preflight import data_problems, run_problems
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.errors import Problem

PAIR = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"


def preferences(config: Config, train: Path | str) -> list[Problem]:
    config.task.name = TaskName.preferences
    config.task.train_file, config.task.eval_file = str(train), "org/pairs:test"
    return data_problems(config)


def test_readable_files_and_dataset_ids_pass(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(PAIR)
    packed.write_bytes(gzip.compress(PAIR.encode()))
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    for source in (plain, packed, tmp_path / "a.parquet", "org/pairs", "org/pairs:train[:10]"):
        assert preferences(Config(), source) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "empty; give a file with rows"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(PAIR.encode())[:12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b""), "empty; give a file with rows"),
        ("a.parquet", PAIR.encode(), "not a Parquet file"),
    ],
)
def test_unreadable_data_names_file_and_reason(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = only(preferences(Config(), tmp_path / name))
    assert text.startswith(f"task.train_file: {tmp_path / name}: ")
    assert words in text


def test_a_directory_is_no_data_file(tmp_path: Path) -> None:
    assert "a directory; give one of its files" in only(preferences(Config(), tmp_path))


def test_a_path_below_a_directory_that_exists_is_no_dataset_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert preferences(Config(), "data/pairs") == []
    (tmp_path / "data").mkdir()
    assert "data/pairs: no such file" in only(preferences(Config(), "data/pairs"))


def test_note2answer_reads_no_files() -> None:
    config = Config()
    config.task.train_file = "/no/file"
    assert data_problems(config) == []


def run_config(root: Path, *, resume: bool = False) -> Config:
    config = Config()
    config.run.root, config.run.resume = str(root), resume
    config.model.policy = "org/policy"
    return config


def test_a_new_run_needs_an_unused_directory(tmp_path: Path) -> None:
    assert run_problems(run_config(tmp_path / "new" / "runs")) == []
    (tmp_path / "run").mkdir()
    assert run_problems(run_config(tmp_path)) == []
    (tmp_path / "run" / "metrics.jsonl").touch()
    text = only(run_problems(run_config(tmp_path)))
    assert text.startswith("run.name: ")
    assert "run.resume=true" in text
    assert "another run.name" in text
    assert run_problems(run_config(tmp_path, resume=True)) == []


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    text = only(run_problems(run_config(tmp_path, resume=True)))
    assert text.startswith(f"run.resume: true, but {tmp_path / 'run'} holds no run")


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    assert "leads outside" in only(run_problems(run_config(tmp_path / "runs")))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    assert "runs: is a file; choose another run.root" in only(run_problems(run_config(tmp_path / "runs")))


def test_a_root_that_cannot_be_written_is_refused() -> None:
    # Nobody, not even root, makes directories here.
    assert "choose another run.root" in only(run_problems(run_config(Path("/proc/runs"))))


def test_checkpoints_must_find_room(tmp_path: Path, tiny_policy_dir: Path) -> None:
    config = run_config(tmp_path / "runs")
    policy = shutil.copytree(tiny_policy_dir, tmp_path / "policy")
    config.model.policy = str(policy)
    assert run_problems(config) == []
    with (policy / "model-00002-of-00002.safetensors").open("wb") as sparse:
        sparse.truncate(shutil.disk_usage(tmp_path).free // 4)
    text = only(run_problems(config))
    assert text.startswith("run.root: ")
    assert "lower checkpoint.keep" in text


def test_the_lock_alone_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert run_problems(run_config(tmp_path)) == []
    assert "holds no run" in only(run_problems(run_config(tmp_path, resume=True)))


def test_checkpoints_that_are_there_already_need_no_room_again(tmp_path: Path, tiny_policy_dir: Path) -> None:
    config = run_config(tmp_path)
    config.checkpoint.keep = 3
    config.model.policy = str(shutil.copytree(tiny_policy_dir, tmp_path / "policy"))
    free = shutil.disk_usage(tmp_path).free
    with (tmp_path / "policy" / "model-00002-of-00002.safetensors").open("wb") as sparse:
        # A checkpoint is four times the policy: a third of what is free.
        sparse.truncate(free // 12)
    assert "checkpoints need" in only(run_problems(config))
    for step in (1, 2, 3):
        (tmp_path / "run" / "checkpoints" / f"step-00000{step}").mkdir(parents=True)
    config.run.resume = True
    assert run_problems(config) == []
