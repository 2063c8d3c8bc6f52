"""Resuming as another run is refused before Ray starts, field by field (requirement 4)."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from r2m_ray import resume
from r2m_ray.checkpoint import CHECKPOINTS, Checkpoints, driver_state
from r2m_ray.compose import load_config
from r2m_ray.config import Config, KLEstimator, OnAlarm, TaskName
from r2m_ray.data import PromptStream
from r2m_ray.errors import InputError, RunError
from r2m_ray.preflight import preflight
from r2m_ray.problems import Problem
from r2m_ray.resume import FREE, RESHARD, flat_config, model_digests, run_identity

Change = Callable[[Config], None]


class Part:
    def __init__(self, name: str) -> None:
        self.name = name

    async def save(self, directory: Path) -> None:
        (directory / self.name).mkdir()
        (directory / self.name / "state.json").write_text("1")


def commit(directory: Path, step: int, identity: dict[str, Any]) -> None:
    parts: Any = SimpleNamespace(policy=Part("policy"), reward=Part("reward_head"))
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=2, identity=identity)
    asyncio.run(checkpoints.save(step, parts, PromptStream(["a"], seed=0)))


def log_steps(directory: Path, last: int) -> None:
    rows = [{"step": step, "kind": "step"} for step in range(1, last + 1)]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path) -> Config:
    """A run on preference files whose checkpoint of step 2 lies in its directory, about to be resumed."""
    config = Config()
    config.run.root = str(tmp_path / "runs")
    config.model.policy = str(shutil.copytree(tiny_policy_dir, tmp_path / "policy"))
    config.model.reward = str(shutil.copytree(tiny_reward_dir, tmp_path / "reward"))
    config.task.name = TaskName.preferences
    for name in ("train", "eval"):
        pair = {"prompt": name, "chosen": "w1", "rejected": "w2"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(pair) + "\n")
    config.task.train_file, config.task.eval_file = (
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "eval.jsonl"),
    )
    directory = tmp_path / "runs" / "run"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    commit(directory, 2, run_identity(config))
    log_steps(directory, 2)
    config.run.resume = True
    return config


def refusals(config: Config) -> list[str]:
    return [str(problem) for problem in preflight(config) if not problem.warning]


def warnings(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems if problem.warning]


def set_field(path: str, value: Any) -> Change:
    section, name = path.split(".")

    def change(config: Config) -> None:
        setattr(getattr(config, section), name, value)

    change.__name__ = path
    return change


def test_the_same_run_goes_on(config: Config) -> None:
    assert preflight(config) == []


REFUSED = [
    (set_field("algo.kl_weight", 0.1), "algo.kl_weight: 0.04 -> 0.1; "),
    (set_field("algo.kl_estimator", KLEstimator.k1), "algo.kl_estimator: k3 -> k1; "),
    (set_field("algo.steps", 99), "algo.steps: 100 -> 99; "),
    (set_field("run.seed", 1), "run.seed: 0 -> 1; "),
    (set_field("reward.omega_floor", 0.7), "reward.omega_floor: 0.6 -> 0.7; "),
    (set_field("feedback.noise", 0.5), "feedback.noise: 0.0 -> 0.5; "),
    (set_field("task.max_new_tokens", 32), "task.max_new_tokens: 48 -> 32; "),
    (
        set_field("rollout.engine_args", {"max_num_seqs": 8}),
        "rollout.engine_args.max_num_seqs: (absent) -> 8; ",
    ),
    (
        set_field("policy.deepspeed", {"optimizer": {"params": {"eps": 0.1}}}),
        "policy.deepspeed.optimizer.params.eps: (absent) -> 0.1; ",
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
@pytest.mark.parametrize("reshard", [False, True])
def test_another_loss_schedule_or_sampling_is_refused(
    config: Config, change: Change, words: str, reshard: bool
) -> None:
    change(config)
    config.run.reshard = reshard
    (text,) = refusals(config)
    assert text.startswith(words)
    assert "another run.name" in text


def test_all_differences_are_told_at_once(config: Config) -> None:
    config.algo.kl_weight, config.policy.learning_rate, config.policy.ranks = 0.1, 1e-5, 2
    assert [text.partition(";")[0] for text in refusals(config)] == [
        "algo.kl_weight: 0.04 -> 0.1",
        "policy.learning_rate: 0.0003 -> 1e-05",
        "policy.ranks: 1 -> 2",
    ]


RESHARDING: list[tuple[Change, str]] = [
    (set_field("policy.ranks", 2), "policy.ranks: 1 -> 2"),
    (set_field("reward.replicas", 2), "reward.replicas: 1 -> 2"),
    (
        set_field("policy.deepspeed", {"zero_optimization": {"stage": 3}}),
        "policy.deepspeed.zero_optimization.stage: (absent) -> 3",
    ),
    (set_field("policy.tokens_per_microbatch", 512), "policy.tokens_per_microbatch: 2048 -> 512"),
    (set_field("reference.tokens_per_microbatch", 512), "reference.tokens_per_microbatch: 4096 -> 512"),
    (set_field("reward.tokens_per_microbatch", 512), "reward.tokens_per_microbatch: 4096 -> 512"),
    (set_field("cluster.threads_per_actor", 2), "cluster.threads_per_actor: 1 -> 2"),
]


def test_the_table_of_resharding_is_whole() -> None:
    assert {words.partition(":")[0].removesuffix(".stage") for _, words in RESHARDING} == set(RESHARD)


@pytest.mark.parametrize(("change", "words"), RESHARDING, ids=[words for _, words in RESHARDING])
def test_other_ranks_or_zero_stage_only_by_a_flag(config: Config, change: Change, words: str) -> None:
    change(config)
    (text,) = refusals(config)
    assert text.startswith(f"{words}; add run.reshard=true")
    config.run.reshard = True
    assert preflight(config) == []


def test_where_and_how_a_run_is_watched_may_change(config: Config, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "runs" / "run").rename(moved / "renamed")
    config.run.root, config.run.name = str(moved), "renamed"
    config.logging.rollouts_per_step, config.checkpoint.every, config.checkpoint.keep = 1, 3, 1
    config.evaluate.every, config.evaluate.prompts = 7, 8
    config.sync.bucket_mb, config.sync.verify_every = 1, 1
    config.monitor.kl, config.monitor.on_alarm = 9.0, OnAlarm.stop
    config.guard.logprob_gap, config.cluster.cpus, config.cluster.phase_timeout_s = 9.0, 8, 900.0
    config.rollout.replicas, config.reference.replicas = 2, 2
    config.prepare.root = "elsewhere"
    assert preflight(config) == []


def test_the_allow_list_is_short_and_names_fields_that_exist() -> None:
    known = set(flat_config(Config())) | {"policy.deepspeed.zero_optimization"}
    for name in (*FREE, *RESHARD):
        assert name in known or any(path.startswith(f"{name}.") for path in known), name
    free = {path for path in known if any(path == name or path.startswith(f"{name}.") for name in FREE)}
    # Rows that are skipped or not are the data's content, which is compared.
    sections = {path.partition(".")[0] for path in free - {"task.skip_bad_rows"}}
    assert sections.isdisjoint({"algo", "model", "task", "reward", "feedback", "policy"})


# Models, tokenizers and data count by content


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


def test_another_reward_model_is_refused(config: Config, tmp_path: Path) -> None:
    flip_last_byte(tmp_path / "reward" / "model.safetensors")
    (text,) = refusals(config)
    assert text.startswith("model.reward: model.safetensors: sha256 ")


def test_another_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "policy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))
    assert [text.partition(": sha256")[0] for text in refusals(config)] == [
        "model.policy: tokenizer_config.json",
        "model.reference: tokenizer_config.json",
    ]


def test_a_file_more_or_less_is_another_model(config: Config, tmp_path: Path) -> None:
    (tmp_path / "reward" / "chat_template.jinja").write_text("{{ messages }}")
    (text,) = refusals(config)
    assert text.startswith("model.reward: chat_template.jinja: (absent) -> sha256 ")


def test_a_hub_id_counts_by_its_name(config: Config) -> None:
    config.model.reward = "org/reward"
    assert "model.reward: hub: (absent) -> org/reward; " in " ".join(refusals(config))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_other_data_is_refused(config: Config, tmp_path: Path, name: str) -> None:
    with (tmp_path / f"{name}.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "w3", "chosen": "w1", "rejected": "w2"}) + "\n")
    (text,) = refusals(config)
    assert text.startswith(f"task.{name}_file: data: sha256 ")


def test_the_ends_of_a_large_file_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "WHOLE_BYTES", 100)
    monkeypatch.setattr(resume, "EDGE_BYTES", 10)
    file = tmp_path / "model.safetensors"

    def digest(content: bytes) -> str:
        file.write_bytes(content)
        return model_digests(str(tmp_path))["model.safetensors"]

    whole = digest(b"h" * 10 + b"m" * 100 + b"t" * 10)
    assert whole.startswith("120 bytes, ")
    assert digest(b"x" + b"h" * 9 + b"m" * 100 + b"t" * 10) != whole
    assert digest(b"h" * 10 + b"m" * 100 + b"t" * 9 + b"x") != whole
    assert digest(b"h" * 10 + b"m" * 101 + b"t" * 10) != whole
    # Up to WHOLE_BYTES, every byte counts.
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


# What there is to resume from


def test_the_guard_looks_at_the_checkpoint_that_will_be_loaded(config: Config, tmp_path: Path) -> None:
    other = run_identity(config)
    other["config"]["algo.kl_weight"] = 0.5
    commit(tmp_path / "runs" / "run", 4, other)
    assert refusals(config)[0].startswith("algo.kl_weight: 0.5 -> 0.04")
    (tmp_path / "runs" / "run" / CHECKPOINTS / "step-000004" / "driver.json").unlink()
    assert refusals(config) == []


def test_no_valid_checkpoint_is_the_end(config: Config, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run" / CHECKPOINTS / "step-000002" / "MANIFEST.json").unlink()
    with pytest.raises(
        RunError, match=r"no checkpoint is valid \(step-000002 is not used: MANIFEST.json is missing"
    ):
        preflight(config)


@pytest.mark.parametrize(
    ("last", "every", "trace", "refused"),
    [
        (11, 10, None, True),  # Step 11 began after the commit of step 10.
        (10, 10, None, False),  # The crash may have come before the first commit.
        (10, 10, "LATEST", True),
        (10, 10, ".damaged-step-000010-0", True),
        (60, 0, None, False),
        (60, 100, None, False),
        (0, 10, None, False),
    ],
)
def test_a_run_that_committed_never_begins_again_unseen(
    config: Config, tmp_path: Path, last: int, every: int, trace: str | None, refused: bool
) -> None:
    directory = tmp_path / "runs" / "run"
    shutil.rmtree(directory / CHECKPOINTS)
    if trace:
        (directory / CHECKPOINTS).mkdir()
        (directory / CHECKPOINTS / trace).touch()
    log_steps(directory, last)
    (directory / "config.yaml").write_text(f"checkpoint: {{every: {every}}}")
    # What the run was asked to do counts, not what it is asked now.
    config.checkpoint.every = 1000
    problems = preflight(config)
    if refused:
        (text,) = refusals(config)
        assert text.startswith(
            f"run.resume: true, but {directory / CHECKPOINTS} holds no checkpoint although "
        )
        assert (trace or f"reaches step {last}") in text
        assert "from a backup" in text
    elif last:
        (text,) = warnings(problems)
        assert text.startswith(f"run.resume: {directory} has no checkpoint yet; its {last} steps")
    else:
        assert problems == []


def test_a_checkpoint_without_identity_is_told(config: Config, tmp_path: Path) -> None:
    commit(tmp_path / "runs" / "run", 3, {})
    problems = preflight(config)
    assert len(problems) == 1
    assert "does not say what its run was made of" in warnings(problems)[0]


def test_a_file_that_cannot_be_read_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "policy" / "loop.json").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"cannot be read"):
        run_identity(config)


def test_the_command_ends_with_two_and_loads_no_engine(config: Config, tmp_path: Path) -> None:
    """The whole command line, in a process of its own."""
    code = (
        "import sys; from r2m_ray.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'ray', 'vllm', 'deepspeed'} & set(sys.modules))); sys.exit(code)"
    )
    overrides = [
        "task=preferences",
        "task.max_prompt_tokens=64",
        "task.max_new_tokens=48",
        f"run.root={config.run.root}",
        f"model.policy={config.model.policy}",
        f"model.reward={config.model.reward}",
        f"task.train_file={config.task.train_file}",
        f"task.eval_file={config.task.eval_file}",
    ]
    original = load_config(overrides)
    commit(tmp_path / "runs" / "run", 3, run_identity(original))
    line = [sys.executable, "-c", code, "train", *overrides, "run.resume=true", "algo.kl_weight=0.125"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"algo.kl_weight: {original.algo.kl_weight} -> 0.125; " in done.stderr
    assert done.stdout == "[]\n"
