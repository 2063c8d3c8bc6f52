"""Resuming as another run is refused before Ray starts, field by field (requirement 4)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resumable import commit, log_steps, refusals, resumable, warnings

from r2m_ray.cli.checks.preflight import preflight
from r2m_ray.config.compose import load_config
from r2m_ray.config.fields import deciding
from r2m_ray.config.schema import RESHARD_OPTIONS, Config, KLEstimator, OnAlarm, Resume
from r2m_ray.errors import InputError, RunError
from r2m_ray.run.checkpoint import CHECKPOINTS
from r2m_ray.run.resume import run_identity

Change = Callable[[Config], None]


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path) -> Config:
    return resumable(tmp_path, tiny_policy_dir, tiny_reward_dir)


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


def test_all_differences_are_reported_at_once(config: Config) -> None:
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
    (set_field("cluster.gpus_per_learner", 1.0), "cluster.gpus_per_learner: 0.0 -> 1.0"),
    (set_field("cluster.gpus_per_rollout", 1.0), "cluster.gpus_per_rollout: 0.0 -> 1.0"),
    (set_field("cluster.gpus_per_reference", 1.0), "cluster.gpus_per_reference: 0.0 -> 1.0"),
    (set_field("cluster.gpus_per_reward", 1.0), "cluster.gpus_per_reward: 0.0 -> 1.0"),
]


def test_the_table_of_resharding_is_complete() -> None:
    named = {words.partition(":")[0].removesuffix(".stage") for _, words in RESHARDING}
    assert named == {*deciding(Resume.reshard), *RESHARD_OPTIONS}


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


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(config: Config, tmp_path: Path) -> None:
    identity = run_identity(config)
    identity["config"] |= {"feedback.norm": "post", "prepare.reward_auxiliary_steps": 0}
    del identity["config"]["monitor.kl"]
    commit(tmp_path / "runs" / "run", 3, identity)
    config.algo.kl_weight = 0.5
    (text,) = refusals(config)
    assert text == (
        "run.resume: an earlier version started this run: it has feedback.norm, and this version has no such "
        "field; finish it with that version, or give another run.name"
    )


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


def test_a_checkpoint_without_identity_is_reported(config: Config, tmp_path: Path) -> None:
    commit(tmp_path / "runs" / "run", 3, {})
    problems = preflight(config)
    assert len(problems) == 1
    assert "does not say what its run was made of" in warnings(problems)[0]


def test_a_file_that_cannot_be_read_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "policy" / "loop.json").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"cannot be read"):
        run_identity(config)


def test_the_command_ends_with_two_and_loads_no_engine(config: Config, tmp_path: Path) -> None:
    """The complete command line, in a process of its own."""
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
