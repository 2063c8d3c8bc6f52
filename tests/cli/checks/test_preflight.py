"""Preflight: what is wrong with models, data or the run directory is reported at once, before Ray starts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from complaints import only

from r2m_ray.cli.checks.preflight import (
    SLOW_STORE,
    data_problems,
    model_problems,
    preflight,
    run_problems,
    store_problems,
)
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines.model_files import ModelFiles, local_directory, open_model
from r2m_ray.errors import Problem


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path) -> Config:
    """A run with complete models, copied so that a test may damage them."""
    config = Config()
    config.run.root = str(tmp_path / "runs")
    config.model.policy = str(shutil.copytree(tiny_policy_dir, tmp_path / "policy"))
    config.model.reward = str(shutil.copytree(tiny_reward_dir, tmp_path / "reward"))
    return config


def edit(directory: str, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = Path(directory) / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_complete_models_have_no_problem(config: Config) -> None:
    assert preflight(config) == []


def test_everything_is_reported_at_once(config: Config, tmp_path: Path) -> None:
    edit(config.model.reward, id2label={"0": "a", "1": "b"})
    (Path(config.model.policy) / "tokenizer.json").unlink()
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    config.task.max_new_tokens = 1000
    config.task.name = TaskName.preferences
    config.task.train_file = config.task.eval_file = str(tmp_path / "none.jsonl")
    config.policy.deepspeed = {"gradient_clipping": 1.0}
    problems = [problem for problem in preflight(config) if not problem.warning]
    assert {problem.path for problem in problems} == {
        "model.policy",
        "model.reward",
        "task.max_new_tokens",
        "policy.deepspeed.gradient_clipping",
        "task.train_file",
        "task.eval_file",
        "run.name",
    }


@pytest.mark.parametrize("name", ["/no/model", "./model", "../model", "no/such/model", "policy/none", "~/x"])
def test_a_missing_model_directory(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config.model.policy = name
    text = only(model_problems(config))
    assert text.startswith(
        f"model.policy: {Path(name)}: no such directory; give a model directory or a hub id"
    )


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B-Instruct", "gpt2", "org/a_model-1.0"])
def test_a_hub_id_is_left_to_the_hub(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_directory(name) is None
    config.model.policy = config.model.reward = config.model.reference = name
    assert model_problems(config) == []


WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def drop_shard(policy: Path) -> None:
    (policy / WEIGHTS).rename(policy / SHARDS[0])
    (policy / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: (p / "config.json").unlink(), "config.json: missing, so this is no model"),
    (lambda p: (p / "config.json").write_text("{"), "config.json: not a JSON object"),
    (lambda p: (p / "config.json").write_text("[]"), "config.json: not a JSON object"),
    (
        lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"),
        "pytorch_model.bin: only pickled weights, which are never loaded",
    ),
    (lambda p: (p / WEIGHTS).unlink(), f"{WEIGHTS}: no weights here; save the model with save_pretrained"),
    (
        lambda p: os.truncate(p / WEIGHTS, (p / WEIGHTS).stat().st_size - 8),
        f"{WEIGHTS}: not a complete safetensors file",
    ),
    (lambda p: os.truncate(p / WEIGHTS, 20), f"{WEIGHTS}: not a complete safetensors file"),
    (drop_shard, f"{SHARDS[1]}: missing; copy the file again"),
    (lambda p: (p / INDEX).write_text("{}"), f"{INDEX}: has no weight_map"),
    (
        lambda p: (p / "tokenizer.json").unlink(),
        "tokenizer.json: no tokenizer here; save it beside the model",
    ),
    (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    (lambda p: edit(str(p), vocab_size=100), "tokenizer.json: has ids up to 159, but vocab_size is 100"),
    (
        lambda p: edit(str(p), architectures=["LlamaForSequenceClassification"]),
        "architectures is LlamaForSequenceClassification; use a causal language model",
    ),
    (
        lambda p: edit(str(p), max_position_embeddings=111),
        "48 + task.max_prompt_tokens=64 = 112 tokens, but model.policy reads 111",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_policy_names_file_and_remedy(
    damage: Callable[[Path], object], words: str, config: Config
) -> None:
    damage(Path(config.model.policy))
    assert words in only(model_problems(config))


def test_a_file_is_no_model_directory(config: Config) -> None:
    config.model.policy += "/config.json"
    assert "not a directory; give the directory that holds its config.json" in only(model_problems(config))


@pytest.mark.parametrize("labels", [None, {"0": "a", "1": "b"}, {str(i): "x" for i in range(5)}])
def test_a_reward_model_has_one_label(labels: dict[str, str] | None, config: Config) -> None:
    edit(config.model.reward, id2label=labels)
    count = 2 if labels is None else len(labels)
    text = only(model_problems(config))
    assert text.startswith(
        f"model.reward: {config.model.reward}/config.json: num_labels (id2label) is {count};"
    )


def test_a_causal_model_is_no_reward_model(config: Config) -> None:
    config.model.reward = config.model.policy
    assert "architectures is LlamaForCausalLM; use a model for sequence" in only(model_problems(config))


def test_a_reference_reads_the_policys_tokens(config: Config, tmp_path: Path) -> None:
    reference = str(shutil.copytree(config.model.policy, tmp_path / "reference"))
    config.model.reference = reference
    assert model_problems(config) == []
    edit(reference, vocab_size=161)
    assert "vocab_size=161, the policy's is 160" in only(model_problems(config))


def test_the_length_of_a_reward_model_that_reads_prompts_is_a_warning(config: Config) -> None:
    edit(config.model.reward, max_position_embeddings=100)
    assert model_problems(config) == []
    config.task.reward_reads_prompt = True
    problems = model_problems(config)
    assert "model.reward reads 100" in only(problems)
    assert problems[0].warning


def test_what_a_config_file_says(config: Config) -> None:
    policy = open_model("model.policy", Path(config.model.policy))
    assert isinstance(policy, ModelFiles)
    assert (policy.positions, policy.vocabulary, policy.architecture) == (256, 160, "LlamaForCausalLM")
    tensors = 2 * 160 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    # The header counts as well: a few kilobytes.
    assert tensors <= policy.parameters < tensors + 2000
    nested = ModelFiles(
        "model.policy", Path(), {"text_config": {"vocab_size": 7, "max_position_embeddings": 9}}
    )
    assert (nested.positions, nested.vocabulary, nested.architecture) == (9, 7, "")
    assert ModelFiles("model.policy", Path(), {"n_positions": 5}).positions == 5


def test_prepared_models_that_are_missing_name_the_command(tmp_path: Path) -> None:
    config = Config()
    config.prepare.root = str(tmp_path)
    text = only(model_problems(config))
    assert text.startswith("model.policy: ")
    assert "r2m-ray prepare" in text


@pytest.mark.parametrize(
    ("address", "gib", "allowed", "refused"),
    [
        ("local", 64, "", True),
        ("local", 9, "", False),
        # Up to 10 GB Ray uses a disk instead, and beyond it where the user allows that.
        ("local", 64, "1", False),
        ("auto", 64, "", False),
    ],
)
def test_an_object_store_larger_than_shared_memory(
    address: str, gib: int, allowed: str, refused: bool, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=16 * 2**30 if gib > 9 else 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setenv(SLOW_STORE, allowed)
    config.cluster.address, config.cluster.object_store_gb = address, gib
    found = store_problems(config.cluster)
    assert bool(found) is refused
    if found:
        text = only(found)
        assert text.startswith("cluster.object_store_gb: 64, but /dev/shm has 16.0 GiB free")
        assert "use 14 or less" in text
        assert "--shm-size=80g or --ipc=host" in text
        assert not found[0].warning


# Data files and the run directory

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
        ("a.jsonl.gz", gzip.compress(PAIR.encode(), mtime=0)[:12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "empty; give a file with rows"),
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
    # The lock alone is no run.
    (tmp_path / "run" / ".lock").touch()
    assert run_problems(run_config(tmp_path)) == []
    assert "holds no run" in only(run_problems(run_config(tmp_path, resume=True)))
    (tmp_path / "run" / "metrics.jsonl").touch()
    text = only(run_problems(run_config(tmp_path)))
    assert text.startswith("run.name: ")
    assert "run.resume=true" in text
    assert "another run.name" in text
    assert run_problems(run_config(tmp_path, resume=True)) == []
    text = only(run_problems(run_config(tmp_path / "other", resume=True)))
    assert text.startswith(f"run.resume: true, but {tmp_path / 'other' / 'run'} holds no run")


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    assert "leads outside" in only(run_problems(run_config(tmp_path / "runs")))


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    # Nobody, not even root, makes directories in /proc.
    for root in (tmp_path / "runs", Path("/proc/runs")):
        assert "choose another run.root" in only(run_problems(run_config(root)))


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
