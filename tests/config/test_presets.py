"""Configuration: every file of conf/ composes, arms are numbers, and overrides have the last word."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from complaints import complaint
from omegaconf import OmegaConf

import r2m_ray
from r2m_ray.config.compose import groups, load_config, load_saved
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import (
    GOLD_TASKS,
    Advantage,
    Config,
    Dtype,
    KLPlace,
    OmegaSchedule,
    PairSource,
    Ratio,
    RewardScale,
    TaskName,
    WandbMode,
    WoInit,
)
from r2m_ray.driver.step import omega_at
from r2m_ray.errors import InputError

PACKAGE = Path(r2m_ray.__file__).parent
FILES = ("task.train_file=org/pairs", "task.eval_file=org/pairs")
NOTE2ANSWER = ("demo", "overoptimization")
"""Experiments that need no data."""
LARGE_BATCH = ("algo.prompts_per_step=64", "algo.minibatch_prompts=32")
EXPERIMENTS = groups()["experiment"]
ARMS = groups()["reward"]


@cache
def experiment(name: str, *overrides: str) -> Config:
    files = () if name in NOTE2ANSWER else FILES
    return load_config([f"experiment={name}", *files, *overrides])


# conf/


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in groups().items() for option in options]
)
def test_every_file_composes_without_an_error(group: str, option: str) -> None:
    needs_files = option not in NOTE2ANSWER and (group == "experiment" or option == "preferences")
    batch = LARGE_BATCH if group == "cluster" else ()
    config = load_config([f"{group}={option}", *batch, *(FILES if needs_files else ())])
    assert [problem for problem in validate(config) if not problem.warning] == []


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("dialogue", "tldr"))])
def test_experiments_of_the_paper_fit_both_gpu_clusters(name: str) -> None:
    for cluster in ("gpu_node", "gpu_cluster"):
        config = experiment(name, f"cluster={cluster}")
        assert config.cluster.gpus_per_learner == 1
        assert validate(config) == []


ARM_NUMBERS = {
    # arm: (Ω < 1, update steps, α, noise); None where nothing reads the number
    "vanilla": (False, 0, None, 0.0),
    "r2m": (True, 1, 0.3, 0.0),
    "r2m_frozen": (True, 0, None, 0.0),
    "r2m_noise": (True, 1, 0.3, 1.0),
    "r2m_no_bt": (True, 1, 1.0, 0.0),
    "r2m_no_gre": (True, 1, 0.0, 0.0),
    "rm_head": (False, 1, 0.3, 0.0),
    "gold": (False, 0, None, 0.0),
    "omega_only": (True, 0, None, 0.0),
    "r2m_oracle": (True, 1, 0.3, 0.0),
    "r2m_random_labels": (True, 1, 0.3, 0.0),
    "r2m_match_frozen": (True, 1, 0.3, 0.0),
    "r2m_zero_init": (True, 1, 0.3, 0.0),
    "r2m_detached": (True, 1, 0.3, 0.0),
    "r2m_constant": (True, 1, 0.3, 0.0),
    "r2m_anchor": (True, 1, 0.0, 0.0),
    "r2m_anchor_mixed": (True, 1, 0.3, 0.0),
    "static_h": (True, 0, None, 0.0),
    "refit": (False, 0, None, 0.0),
    "refit_online": (False, 1, 0.0, 0.0),
}
ARM_CHANGES: dict[str, dict[str, object]] = {
    # What an arm changes beside these.
    "gold": {"reward.gold_weight": 1.0},
    "omega_only": {"reward.init_std": 0.0},
    "r2m_oracle": {"reward.pair_source": PairSource.gold},
    "r2m_random_labels": {"reward.pair_source": PairSource.random},
    "r2m_match_frozen": {"reward.scale": RewardScale.match_frozen},
    "r2m_zero_init": {"reward.wo_init": WoInit.zero},
    "r2m_detached": {"reward.gre_detach_stats": True},
    "r2m_constant": {"reward.omega_schedule": OmegaSchedule.constant},
    "r2m_anchor": {"reward.anchor_fraction": 1.0},
    "r2m_anchor_mixed": {"reward.anchor_fraction": 0.5},
    "static_h": {"reward.warmup_pairs": 4096, "reward.omega_schedule": OmegaSchedule.constant},
    "refit": {"reward.warmup_pairs": 4096, "reward.omega_schedule": OmegaSchedule.constant},
    "refit_online": {"reward.anchor_fraction": 1.0, "reward.omega_schedule": OmegaSchedule.constant},
}
GOLD_ARMS = ("gold", "r2m_oracle")


@pytest.mark.parametrize(("name", "arm"), [*itertools.product(EXPERIMENTS, ARMS)])
def test_arms_are_numbers_and_keep_them_in_every_experiment(name: str, arm: str) -> None:
    if arm in GOLD_ARMS and experiment(name).task.name not in GOLD_TASKS:
        assert "knows no gold score" in complaint(f"experiment={name}", *FILES, f"reward={arm}")
        return
    feedback, updates, alpha, noise = ARM_NUMBERS[arm]
    config = experiment(name, f"reward={arm}")
    assert config.uses_feedback is feedback
    assert config.reward.omega_floor == (experiment(name).reward.omega_floor if feedback else 1.0)
    assert config.reward.update_steps == updates
    assert alpha is None or config.reward.entropy_weight == alpha
    assert config.feedback.noise == noise


def test_an_arm_changes_nothing_but_its_numbers() -> None:
    numbers = {"reward.omega_floor", "reward.update_steps", "reward.entropy_weight", "feedback.noise"}
    base = experiment("demo")
    for arm in ARMS:
        config = experiment("demo", f"reward={arm}")
        changed = set(differences(base, config)) - numbers
        assert {path: flat(config)[path] for path in changed} == ARM_CHANGES.get(arm, {})


def test_a_head_fitted_before_the_first_step_is_read_at_the_omega_it_was_fitted_at() -> None:
    fitted = [arm for arm in ARMS if experiment("demo", f"reward={arm}").reward.warmup_pairs]
    assert sorted(fitted) == ["refit", "static_h"]
    for name, arm in itertools.product(EXPERIMENTS, fitted):
        config = experiment(name, f"reward={arm}")
        assert {omega_at(config, t) for t in (1, config.algo.steps)} == {config.reward.omega_floor}


def test_algorithms_differ_by_advantage_ratio_and_place_of_the_kl() -> None:
    chosen = {name: load_config([f"algo={name}"]).algo for name in groups()["algo"]}
    assert {name: algo.advantage for name, algo in chosen.items()} == {a.value: a for a in Advantage}
    ratios = {name for name, algo in chosen.items() if algo.ratio is Ratio.sequence}
    assert ratios == {"rloo", "remax"}
    in_reward = {name for name, algo in chosen.items() if algo.kl_place is KLPlace.reward}
    assert in_reward == {"reinforce_pp", "remax"}


PAPER = {
    "dialogue_qwen2_5_3b": {"policy.learning_rate": 6e-6, "reward.omega_floor": 0.7},
    "dialogue_llama3_8b": {"policy.learning_rate": 1e-6, "reward.omega_floor": 0.6},
}
DIALOGUE = {
    "algo.steps": 100, "algo.prompts_per_step": 64, "algo.responses_per_prompt": 8, "algo.temperature": 0.7,
    "algo.epochs": 2, "algo.clip_low": 0.2, "algo.clip_high": 0.2, "algo.kl_weight": 0.04,
    "task.max_new_tokens": 512, "reward.attention_width": 2048, "reward.learning_rate": 1e-6,
    "reward.entropy_weight": 0.3, "reward.init_std": 0.02, "model.dtype": Dtype.bfloat16,
    "model.reward": "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
}  # fmt: skip
TLDR = {
    "algo.prompts_per_step": 2048, "algo.responses_per_prompt": 4, "algo.steps": 122,
    "task.max_new_tokens": 50, "policy.learning_rate": 3e-6, "reward.learning_rate": 5e-7,
    "reward.omega_floor": 0.6,
}  # fmt: skip
DEMO = {
    "task.name": TaskName.note2answer, "algo.steps": 24, "algo.prompts_per_step": 16,
    "algo.responses_per_prompt": 8, "algo.epochs": 2, "algo.minibatch_prompts": 8, "algo.temperature": 1.0,
    "reward.omega_floor": 0.6, "reward.entropy_weight": 0.3, "reward.learning_rate": 1e-4,
    "reward.init_std": 0.15, "reward.attention_width": 64, "policy.learning_rate": 3e-4,
    "evaluate.every": 6, "evaluate.prompts": 64, "logging.wandb": WandbMode.offline,
    "rollout.engine_args": {
        "enforce_eager": True, "max_num_seqs": 128, "block_size": 32, "num_gpu_blocks_override": 2048,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, DIALOGUE | own) for name, own in PAPER.items()), ("tldr_pythia_2_8b", TLDR), ("demo", DEMO)],
)
def test_experiments_hold_their_settings(name: str, settings: dict[str, object]) -> None:
    values = flat(experiment(name))
    assert {path: values[path] for path in settings} == settings


def test_one_million_trajectories_of_the_summarization_experiment() -> None:
    algo = experiment("tldr_pythia_2_8b").algo
    trajectories = algo.steps * algo.prompts_per_step * algo.responses_per_prompt
    assert trajectories == pytest.approx(1e6, rel=1e-3)


def test_the_command_line_has_the_last_word() -> None:
    config = load_config(["experiment=demo", "reward=vanilla", "reward.omega_floor=0.5", "algo=grpo"])
    assert (config.reward.omega_floor, config.reward.update_steps) == (0.5, 0)
    assert (config.algo.advantage, config.algo.steps) == (Advantage.grpo, 24)


def test_options_for_the_engines_pass_through() -> None:
    config = load_config(
        [
            "rollout.engine_args.block_size=16",
            "~rollout.engine_args.num_gpu_blocks_override",
            "+rollout.engine_args.enable_prefix_caching=false",
            "~rollout.engine_args.enforce_eager",
            "policy.deepspeed={zero_optimization: {stage: 1}}",
        ]
    )
    assert config.rollout.engine_args == {
        "max_num_seqs": 128,
        "block_size": 16,
        "enable_prefix_caching": False,
    }
    assert config.policy.deepspeed == {"zero_optimization": {"stage": 1}}


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(["experiment=demo"])
    assert list(tmp_path.iterdir()) == []


def test_options_of_ones_own_are_found_and_checked(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    header = "# @package _global_\ndefaults: [override /algo: grpo]\n"
    search = f"hydra.searchpath=[file://{tmp_path}]"

    file.write_text(f"{header}algo: {{steps: 7}}")
    algo = load_config([search, "experiment=mine"]).algo
    assert (algo.steps, algo.advantage) == (7, Advantage.grpo)

    file.write_text(f"{header}algo: {{stepz: 7, epochs: two}}")
    text = complaint(search, "experiment=mine", "reward=vanila", "hydra.nothing=1")
    assert text.startswith("4 problems")
    assert "Could not override 'hydra.nothing'" in text
    assert "Did you mean vanilla?" in text
    assert "Did you mean algo.steps?" in text
    assert "algo.epochs: two is not a whole number ≥ 1" in text

    file.write_text("a: [")
    assert "experiment=mine: while parsing" in complaint(search, "experiment=mine")


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = experiment("preferences_tiny", "run.seed=7", "algo=remax")
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load_saved(file, []) == config
    assert differences(config, load_saved(file, ["evaluate.prompts=8"])) == ["evaluate.prompts"]
    for overrides, words in (
        (["reward=vanilla"], "chooses from a group"),
        (["evaluate.promts=8"], "Did you mean evaluate.prompts?"),
        (["evaluate.prompts=8,9"], "several values"),
    ):
        with pytest.raises(InputError, match=words):
            load_saved(file, overrides)
    file.write_text("a: [")
    with pytest.raises(InputError, match="not a configuration"):
        load_saved(file, [])


def flat(config: Config) -> dict[str, Any]:
    values = asdict(config)
    return {f"{section}.{name}": value for section in values for name, value in values[section].items()}


def differences(one: Config, other: Config) -> list[str]:
    first, second = flat(one), flat(other)
    return [path for path in first if first[path] != second[path]]
