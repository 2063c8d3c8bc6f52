"""What a run is made of: models, tokenizers and data count by content, libraries are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resumable import commit, refusals, resumable, warnings

from r2m_ray.cli.checks.preflight import preflight
from r2m_ray.config.schema import Config
from r2m_ray.run import resume
from r2m_ray.run.checkpoint import CHECKPOINTS, driver_state
from r2m_ray.run.resume import model_digests, run_identity


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path) -> Config:
    return resumable(tmp_path, tiny_policy_dir, tiny_reward_dir)


def test_models_and_data_may_move(config: Config, tmp_path: Path) -> None:
    for name in ("policy", "reward", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    config.model.policy, config.model.reward = str(tmp_path / "moved-policy"), str(tmp_path / "moved-reward")
    config.task.train_file = str(tmp_path / "moved-train.jsonl")
    config.task.eval_file = str(tmp_path / "moved-eval.jsonl")
    (tmp_path / "moved-policy" / "README.md").write_text("a note")
    (tmp_path / "moved-policy" / ".cache").touch()
    assert preflight(config) == []


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_another_policy_is_refused_by_its_digest(config: Config, tmp_path: Path) -> None:
    weights = tmp_path / "policy" / "model.safetensors"
    before = model_digests(str(tmp_path / "policy"))["model.safetensors"]
    flip_last_byte(weights)
    after = model_digests(str(tmp_path / "policy"))["model.safetensors"]
    texts = refusals(config)
    assert texts[0].startswith(f"model.policy: model.safetensors: {before} -> {after}; ")
    # π_ref is the initial policy, so it is another one too.
    assert texts[1].startswith("model.reference: model.safetensors: ")
    assert len(texts) == 2


def test_another_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "policy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))
    assert [text.partition(": sha256")[0] for text in refusals(config)] == [
        "model.policy: tokenizer_config.json",
        "model.reference: tokenizer_config.json",
    ]


def test_another_reward_model_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "reward" / "chat_template.jinja").write_text("{{ messages }}")
    (text,) = refusals(config)
    assert text.startswith("model.reward: chat_template.jinja: (absent) -> sha256 ")
    # A hub id counts by its name.
    config.model.reward = "org/reward"
    assert "model.reward: hub: (absent) -> org/reward; " in " ".join(refusals(config))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_other_data_is_refused(config: Config, tmp_path: Path, name: str) -> None:
    with (tmp_path / f"{name}.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "w3", "chosen": "w1", "rejected": "w2"}) + "\n")
    (text,) = refusals(config)
    assert text.startswith(f"task.{name}_file: data: sha256 ")


def test_the_ends_of_a_large_file_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "COMPLETE_BYTES", 100)
    monkeypatch.setattr(resume, "EDGE_BYTES", 10)
    file = tmp_path / "model.safetensors"

    def digest(content: bytes) -> str:
        file.write_bytes(content)
        return model_digests(str(tmp_path))["model.safetensors"]

    plain = digest(b"h" * 10 + b"m" * 100 + b"t" * 10)
    assert plain.startswith("120 bytes, ")
    assert digest(b"x" + b"h" * 9 + b"m" * 100 + b"t" * 10) != plain
    assert digest(b"h" * 10 + b"m" * 100 + b"t" * 9 + b"x") != plain
    assert digest(b"h" * 10 + b"m" * 101 + b"t" * 10) != plain
    # Up to COMPLETE_BYTES, every byte counts.
    assert digest(b"m" * 50) != digest(b"m" * 25 + b"x" + b"m" * 24)


def test_other_library_versions_are_a_warning(config: Config, tmp_path: Path) -> None:
    identity = run_identity(config)
    identity["versions"]["torch"] = "1.0"
    commit(tmp_path / "runs" / "run", 3, identity)
    problems = preflight(config)
    assert len(problems) == 1
    (text,) = warnings(problems)
    assert text.startswith("torch: 1.0 -> ")


def test_a_field_that_was_added_since_counts_as_its_default(config: Config, tmp_path: Path) -> None:
    identity = run_identity(config)
    del identity["config"]["algo.importance_cap"]
    commit(tmp_path / "runs" / "run", 3, identity)
    assert preflight(config) == []
    config.algo.importance_cap = 3.0
    assert refusals(config)[0].startswith("algo.importance_cap: 2.0 -> 3.0; ")


def test_an_identity_holds_no_secret(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789")
    config.rollout.engine_args = {"hf_token": "hf_canary987654", "seed_file": "canary-0123456789"}
    commit(tmp_path / "runs" / "run", 3, run_identity(config))
    directory = tmp_path / "runs" / "run" / CHECKPOINTS / "step-000003"
    assert driver_state(directory).identity["config"]["rollout.engine_args.hf_token"] == "<hidden>"
    assert not any(b"canary" in file.read_bytes() for file in directory.rglob("*.json"))
