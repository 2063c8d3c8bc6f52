"""The table of arms and the presets: every arm composes, no two are alike, and the order is the lab's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overoptimization.arms import ARMS, BASELINE, Arm, arms_named
from benchmarks.overoptimization.information import Information
from benchmarks.overoptimization.lab import Lab, check
from benchmarks.overoptimization.presets import (
    INFORMATIVE,
    PRESETS,
    SELF_CORRECT,
    TOY,
    UNINFORMATIVE,
    Preset,
    World,
    chosen,
)
from benchmarks.overoptimization.runs import Models, Run
from benchmarks.overoptimization.worlds import recipe
from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import Advantage, Config
from r2m_ray.errors import InputError
from r2m_ray.run.resume import flat_config

METHOD = ("algo.", "reward.", "feedback.", "policy.")


def config_of(name: str, world: World = TOY, root: Path = Path("root")) -> Config:
    return load_config(Run(world=world, arm=ARMS[name], seed=3, root=root).overrides())


def method(name: str) -> dict[str, object]:
    """The settings that an arm is made of in the informative world, and the reward model's own world."""
    flat = {
        path: value
        for path, value in flat_config(config_of(name, INFORMATIVE)).items()
        if path.startswith(METHOD)
    }
    return flat | {"world": ARMS[name].reward_world}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_composes_under_its_own_name(name: str) -> None:
    config = config_of(name)
    assert (config.run.name, config.run.root, config.run.seed) == (f"{name}-seed-3", "root/toy", 3)
    assert config.checkpoint.every == 5
    assert config.algo.steps == 4


def test_no_two_arms_are_the_same_method() -> None:
    methods = {name: method(name) for name in ARMS}
    twins = [(a, b) for a in ARMS for b in ARMS if a < b and methods[a] == methods[b]]
    assert twins == []


def test_the_papers_arms_are_its_numbers() -> None:
    vanilla, r2m = config_of("rloo").reward, config_of("rloo_r2m").reward
    assert (vanilla.omega_floor, vanilla.update_steps) == (1.0, 0)
    assert (r2m.omega_floor, r2m.update_steps, r2m.entropy_weight) == (0.6, 1, 0.3)
    assert config_of("grpo_r2m").algo.advantage is Advantage.grpo
    assert config_of("r2m_frozen").reward.update_steps == 0
    assert config_of("r2m_no_bt").reward.entropy_weight == 1.0
    assert config_of("r2m_noise").feedback.noise == 1.0
    penalised = [
        config_of(name).algo.kl_weight for name in ("rloo_beta_0.02", "rloo_beta_0.1", "r2m_beta_0.1")
    ]
    assert penalised == [0.02, 0.1, 0.1]
    assert config_of("r2m_lr_1e-3").reward.learning_rate == 1e-3
    assert config_of("r2m_paper_init").reward.init_std == 0.02
    papers = {arm.paper for arm in ARMS.values() if arm.paper}
    assert papers == {
        "RLOO", "GRPO", "ReMax", "REINFORCE++", "RLOO+R2M", "GRPO+R2M", "R2M w/o Train", "R2M w/ Noise",
        "R2M w/o BT", "R2M w/o GRE", "Pretrained RM", "Iterative RMHead",
    }  # fmt: skip


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.without_h], ids=lambda arm: arm.name)
def test_an_arm_and_its_control_learn_the_same_and_differ_in_h(arm: Arm) -> None:
    ours, theirs = config_of(arm.name, INFORMATIVE), config_of(str(arm.without_h), INFORMATIVE)
    assert (ours.uses_feedback, theirs.uses_feedback) == (True, False)
    for name in ("warmup_pairs", "warmup_learning_rate", "anchor_fraction", "update_steps", "learning_rate"):
        assert getattr(ours.reward, name) == getattr(theirs.reward, name), name


def test_the_command_line_cannot_change_what_an_arm_is(tmp_path: Path) -> None:
    run = Run(
        world=TOY,
        arm=ARMS["rloo_beta_0.1"],
        seed=0,
        root=tmp_path,
        extra=("algo.kl_weight=0.5", "algo.steps=7"),
    )
    config = load_config(run.overrides(Models(policy=tmp_path / "policy", reward=tmp_path / "reward")))
    assert (config.algo.kl_weight, config.algo.steps) == (0.1, 7)
    assert (config.model.policy, config.model.reward) == (str(tmp_path / "policy"), str(tmp_path / "reward"))


@pytest.mark.parametrize("arm", ["good_reward", "better_reward"])
def test_a_good_reward_model_reads_the_note_and_sees_no_bias(arm: str) -> None:
    run = Run(world=INFORMATIVE, arm=ARMS[arm], seed=0, root=Path("root"))
    (own, plain), (scored, added) = (
        (made_of.config, made_of.additions)
        for made_of in (recipe(run.world_overrides), recipe(run.reward_overrides))
    )
    assert (own.task.reward_reads_prompt, own.task.annotator_bias) == (False, 0.2)
    assert (scored.task.reward_reads_prompt, scored.task.annotator_bias) == (True, 0.0)
    assert (plain.reward_from_policy, plain.reward_auxiliary_steps) == (False, 600)
    assert (added.reward_from_policy, added.reward_auxiliary_truth) == (True, True)
    trained = load_config(run.overrides(Models(policy=Path("here"), reward=Path("elsewhere"))))
    assert trained.task == own.task


def test_a_reward_world_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def never(*asked: object) -> Information:
        raise AssertionError(asked)

    lab = Lab(
        preset=chosen("quick", ["good_reward"], [0]),
        root=tmp_path,
        jobs=1,
        precheck=never,
        extra=("prepare.policy_layers=5",),
    )
    with pytest.raises(InputError, match=r"good_reward-seed-0: prepare\.reward_layers: 4.*use 5"):
        check(lab)


def names(preset: Preset, world: object) -> list[str]:
    return [
        f"{arm.name} {seed}" for found in preset.worlds if found is world for arm, seed in preset.runs(found)
    ]


def test_the_baseline_comes_first_and_then_complete_seeds() -> None:
    assert names(PRESETS["quick"], INFORMATIVE) == [
        "rloo 0", "rloo 1",
        "rloo_r2m 0", "gold 0", "refit 0", "static_h 0", "r2m_anchor 0", "r2m_anchor_constant 0",
        "r2m_constant 0",
        "rloo_r2m 1", "gold 1", "refit 1", "static_h 1", "r2m_anchor 1", "r2m_anchor_constant 1",
        "r2m_constant 1",
    ]  # fmt: skip


def test_full_is_eight_arms_by_six_seeds_the_others_by_two_a_control_world_and_doses() -> None:
    full = PRESETS["full"]
    informative, control = names(full, INFORMATIVE), names(full, UNINFORMATIVE)
    third_dose = 2
    assert len(informative) == len({*informative}) == 8 * 6 + (len(ARMS) - 8) * 2 + third_dose
    assert len(control) == 5 * 3
    assert full.worlds == (INFORMATIVE, UNINFORMATIVE, *SELF_CORRECT.values())
    at_seed_1 = [informative.index(f"{name} 1") for name in ARMS if name != BASELINE]
    assert max(informative.index(f"{name} 0") for name in ARMS) < min(at_seed_1)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_run_of_every_preset_composes(name: str, tmp_path: Path) -> None:
    def never(*asked: object) -> Information:
        raise AssertionError(asked)

    check(Lab(preset=chosen(name, seeds=[0]), root=tmp_path, jobs=1, precheck=never))


def test_gates_look_at_three_seeds_at_least() -> None:
    assert PRESETS["quick"].gate_seeds(INFORMATIVE) == (0, 1, 2)
    assert PRESETS["full"].gate_seeds(INFORMATIVE) == (0, 1, 2, 3, 4, 7)
    assert PRESETS["smoke"].gate_seeds(TOY) == (0,)
    assert chosen("quick", seeds=[4]).gate_seeds(INFORMATIVE) == (4, 0, 1)


def test_arms_and_seeds_can_be_replaced_and_the_baseline_stays() -> None:
    preset = chosen("full", ["remax", "grpo"], [7, 8])
    for world in (INFORMATIVE, UNINFORMATIVE):
        assert names(preset, world) == ["rloo 7", "rloo 8", "grpo 7", "remax 7", "grpo 8", "remax 8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quik",), "no preset 'quik'; there are smoke, quick, control, doses, full. Did you mean quick?"),
        (("quick", ["r2m_ancor"]), "no arm 'r2m_ancor'; .* Did you mean r2m_anchor"),
        (("quick", [], [1, 1]), "--seeds 1 1: give different numbers"),
        (("quick", [], [-1]), "--seeds -1: give different numbers from 0 on"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(*arguments)  # type: ignore[arg-type]


def test_arms_come_in_the_order_of_the_table() -> None:
    assert [arm.name for arm in arms_named(["refit", "grpo"])] == ["rloo", "grpo", "refit"]
