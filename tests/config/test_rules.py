"""Fields that contradict each other: each rule names a remedy, and what fits together passes."""

from __future__ import annotations

import itertools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from complaints import complaint, lines_about

from r2m_ray.config.compose import load_config
from r2m_ray.config.fields import fields
from r2m_ray.config.rules import CPU_HEAD_SIZES, RULES, validate
from r2m_ray.config.schema import LEAST_TEMPERATURE
from r2m_ray.errors import Problem

ONE_GPU_EACH = "cluster.gpus_per_learner=1 cluster.gpus_per_rollout=1"
ARGS = "rollout.engine_args"
TWO_RANKS = f"{ARGS}.tensor_parallel_size=2 {ARGS}.distributed_executor_backend=mp"
PREFERENCES = "task=preferences task.train_file=org/pairs task.eval_file=org/pairs"

REFUSED = [
    ("reward=r2m_anchor reward.update_steps=0", "reward.anchor_fraction", "update_steps=1, or"),
    ("reward=r2m_no_bt reward.anchor_fraction=0.5", "reward.anchor_fraction", "no weight"),
    ("reward=static_h prepare.pair_rows=4000", "reward.warmup_pairs", "use at most 4000"),
    ("reward=static_h reward.warmup_learning_rate=0", "reward.warmup_learning_rate", "teach nothing"),
    ("algo.prompts_per_step=18", "algo.prompts_per_step", "use 16 or 20"),
    ("algo.minibatch_prompts=6", "algo.minibatch_prompts", "use 4 or 8"),
    ("algo.minibatch_prompts=12 policy.ranks=2", "algo.minibatch_prompts", "use 8 or 16"),
    ("algo.minibatch_prompts=32", "algo.minibatch_prompts", "at most 16"),
    ("algo.prompts_per_step=20", "algo.prompts_per_step", "use 16 or 24"),
    ("rollout.replicas=5", "rollout.replicas", "at most 4"),
    ("reward.replicas=5", "reward.replicas", "at most 4"),
    ("reference.replicas=5", "reference.replicas", "at most 4"),
    ("algo.responses_per_prompt=2 reward=r2m_no_bt", "reward.entropy_weight", "nothing is learned"),
    ("sync.backend=nccl", "sync.backend", "use object_store"),
    ("cluster.address=none policy.ranks=2", "policy.ranks", "one worker of each role; use 1"),
    ("cluster.address=none reference.replicas=2", "reference.replicas", "one worker of each role; use 1"),
    (f"{ONE_GPU_EACH} cluster.address=none sync.backend=nccl", "sync.backend", "has no peers"),
    ("sync.backend=ipc cluster.gpus_per_learner=1", "sync.backend", "gpus_per_rollout=0"),
    ("cluster.gpus_per_rollout=1.5", "cluster.gpus_per_rollout", "use 1 or 2"),
    ("cluster.cpus_per_actor=0.6", "cluster.cpus_per_actor", "use 0.5"),
    ("cluster.object_store_gb=0.01", "cluster.object_store_gb", "use 0.08 or more"),
    ("cluster.placement=SPRED", "cluster.placement", "Did you mean SPREAD?"),
    ("task=preferences task.eval_file=org/pairs", "task.train_file", "give task.train_file=…"),
    ("task=preferences task.train_file=org/pairs", "task.eval_file", "give task.eval_file=…"),
    ("task.train_file=org/pairs", "task.train_file", "task=preferences alone"),
    ("prepare.policy_width=90 prepare.policy_heads=4", "prepare.policy_width", "use 88 or 96"),
    ("run.root=''", "run.root", "is empty"),
    ("rollout.engine_args.trust_remote_code=true", "rollout.engine_args.trust_remote_code", "never run"),
    ("run.name=.x", "run.name", "no dot first"),
    ("prepare.policy_width=48", "prepare.policy_width", "use 96"),
    ("algo.temperature=0.009", "algo.temperature", "is not a number ≥ 0.01"),
    (f"{PREFERENCES} reward=r2m_oracle", "reward.pair_source", "no gold score; use task.name=note2answer"),
    (f"{PREFERENCES} reward=gold", "reward.gold_weight", "knows no gold score"),
    ("reward=r2m_random_labels reward.pair_min_margin=0.1", "reward.pair_min_margin", "have no margin"),
    ("reward=r2m reward.shape=par", "reward.omega_schedule", "use constant"),
    ("cluster.stop_grace_s=600", "cluster.stop_grace_s", "use 540 or less"),
    (f"{ONE_GPU_EACH} sync.backend=ipc", "sync.backend", "no two of them share one; use nccl"),
    ("cluster.gpus_per_learner=2", "cluster.gpus_per_learner", "computes on one GPU; use 1"),
    ("cluster.gpus_per_reward=2", "cluster.gpus_per_reward", "computes on one GPU; use 1"),
    ("cluster.gpus_per_reference=2", "cluster.gpus_per_reference", "computes on one GPU; use 1"),
    ("cluster.gpus_per_learner=0.5 policy.ranks=2", "cluster.gpus_per_learner", "NCCL cannot join them"),
    ("cluster.gpus_per_reward=0.5 reward.replicas=2", "cluster.gpus_per_reward", "NCCL cannot join them"),
    (
        "rollout.engine_args.tensor_parallel_size=2 cluster.gpus_per_rollout=2",
        "rollout.engine_args.distributed_executor_backend",
        "set it to mp",
    ),
    (f"{TWO_RANKS} cluster.gpus_per_rollout=1", "cluster.gpus_per_rollout", "make them equal"),
    ("cluster.gpus_per_rollout=2", "cluster.gpus_per_rollout", "make them equal"),
    (f"{ARGS}.data_parallel_size=2", f"{ARGS}.data_parallel_size", "replicated by"),
    (f"{ARGS}.tensor_parallel_size=two", f"{ARGS}.tensor_parallel_size", "not a whole number"),
]
WARNED = [
    ("reward.warmup_pairs=64", "reward.omega_schedule", "at ω = 0.6; use constant"),
    ("algo.responses_per_prompt=2", "reward.entropy_weight", "has no effect"),
    ("algo.epochs=1 algo.minibatch_prompts=16", "feedback.refresh", "not refreshed"),
    ("model.dtype=bfloat16", "model.dtype", "use float32"),
    ("model.reward_dtype=bfloat16", "model.reward_dtype", "use float32"),
    ("algo.kl_estimator=k1", "algo.kl_estimator", "expected gradient of zero"),
    ("algo=remax algo.kl_estimator=k3", "algo.kl_estimator", "is not differentiated"),
    ("monitor.on_alarm=stop algo.steps=5", "monitor.steps", "would never stop"),
    ("reward=vanilla reward.shape=par algo=grpo", "reward.shape", "use rloo, dr_grpo or"),
    ("reward=gold reward.shape=par", "reward.shape", "no advantage comes from the reward model"),
    ("reward=vanilla reward.pair_source=frozen_rm", "reward.pair_source", "no pair is learned"),
    ("reward=r2m_frozen reward.pair_min_margin=0.1", "reward.pair_min_margin", "no pair is"),
    ("reward=r2m_match_frozen algo=grpo", "reward.scale", "has no effect: algo.advantage=grpo"),
]


@pytest.mark.parametrize(("overrides", "path", "words"), REFUSED)
def test_a_rule_refuses_by_field_and_remedy(overrides: str, path: str, words: str) -> None:
    found = lines_about(complaint(*overrides.split()), path)
    assert any(words in line for line in found), found


@pytest.mark.parametrize(("overrides", "path", "words"), WARNED)
def test_a_rule_warns_by_field_and_remedy(overrides: str, path: str, words: str) -> None:
    found = [problem for problem in validate(load_config(overrides.split())) if problem.path == path]
    assert any(problem.warning and words in problem.message for problem in found), found


def test_every_rule_has_a_case() -> None:
    broken = {path for _, path, _ in (*REFUSED, *WARNED)}
    # The code of a model is refused below the field that the rule reads.
    assert all(any(path.startswith(read) for path in broken for read in reads) for reads, _ in RULES)
    assert set(itertools.chain(*(reads for reads, _ in RULES))) <= set(fields())


@pytest.mark.parametrize(
    "overrides",
    [
        f"{TWO_RANKS} cluster.gpus_per_rollout=2",
        f"{TWO_RANKS} cluster.gpus_per_rollout=0",
        "sync.backend=ipc cluster.gpus_per_learner=0.5 cluster.gpus_per_rollout=0.5",
        f"{ONE_GPU_EACH} sync.backend=nccl policy.ranks=2",
        "algo.kl_estimator=k1 algo.kl_weight=0",
        "algo.kl_estimator=k2",
        "reward=r2m_oracle reward.pair_min_margin=0.5",
        "reward=r2m_random_labels",
        "reward=gold algo=grpo",
        "reward=r2m_match_frozen algo=grpo reward.gold_weight=0.5",
        *(f"reward=r2m_match_frozen algo={name}" for name in ("dr_grpo", "remax", "reinforce_pp")),
        "algo.temperature=0.01",
        "prepare.policy_width=48 model.policy=org/policy",
        "prepare.policy_width=48 cluster.gpus_per_rollout=1",
        "prepare.policy_width=192 prepare.policy_heads=2",
        "cluster.phase_timeout_s=20 cluster.stop_grace_s=10",
        "reward=r2m_anchor reward.warmup_pairs=64 reward.omega_schedule=constant",
        "reward=refit reward.omega_schedule=cosine",
        "reward=static_h reward.warmup_pairs=0 reward.warmup_learning_rate=0",
        "reward=static_h reward.warmup_pairs=20000",
        *(f"algo.responses_per_prompt=2 reward={arm}" for arm in ("r2m_no_gre", "vanilla", "r2m_frozen")),
        *(
            f"algo.epochs=1 algo.minibatch_prompts=16 {change}"
            for change in (
                "reward=vanilla",
                "reward=r2m_frozen",
                "feedback.refresh=exact",
                "feedback.refresh=none",
            )
        ),
    ],
)
def test_what_fits_together_passes_without_a_word(overrides: str) -> None:
    assert validate(load_config(overrides.split())) == []


def test_vllms_own_limits_are_the_ones_the_rules_state() -> None:
    # Read as text: importing them starts vLLM.
    root = Path(str(find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    attention = (root / "v1" / "attention" / "backends" / "cpu_attn.py").read_text()
    assert f"return {list(CPU_HEAD_SIZES)}" in attention
    least = re.search(r"^_MAX_TEMP = (.+)$", (root / "sampling_params.py").read_text(), re.MULTILINE)
    assert least is not None
    assert float(least[1]) == LEAST_TEMPERATURE


def test_a_rule_is_silent_about_a_field_known_to_be_wrong() -> None:
    text = complaint("algo.prompts_per_step=0", "algo.prompts_per_shard=three")
    assert text.startswith("2 problems")


def test_a_problem_is_one_line() -> None:
    assert str(Problem("a.b", "one\ntwo")) == "a.b: one\\x0atwo"
