"""The arms: each a name and the overrides that make it, so that an arm is numbers and no code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r2m_ray.errors import InputError, hint

BASELINE = "rloo"
"""The arm that every other one is held against, and the gates are asked of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One method. paper: what the paper calls it, None where it has no such arm.

    reward_world: where not empty, the arm scores with the reward model of the world that these overrides make
    of the run's own, instead of the run's. without_h: the arm that learns from the same pairs and reads no h,
    where there is one: only against it is a gain h's.
    """

    name: str
    overrides: tuple[str, ...]
    paper: str | None = None
    reward_world: tuple[str, ...] = ()
    without_h: str | None = None


CLEAN_LABELS = ("task.annotator_bias=0.0", "task.label_temperature=0.05")
"""Pairs labelled by gold alone, and hardly ever against it."""
_READS_NOTE = (
    *CLEAN_LABELS,
    "task.reward_reads_prompt=true",
    "lab.reward_from_policy=true",
    "prepare.reward_width=96",
    "prepare.reward_heads=3",
    "prepare.reward_layers=4",
    "lab.reward_auxiliary_truth=true",
)
GOOD_REWARD = (*_READS_NOTE, "lab.reward_auxiliary_steps=2000", "prepare.reward_steps=1000")
"""The negative control's: it starts as the policy, reads the note, counts wrong facts, and sees no bias."""
BETTER_REWARD = (
    *_READS_NOTE,
    "prepare.pair_rows=60000",
    "lab.reward_auxiliary_steps=5000",
    "prepare.reward_steps=2500",
)
"""The same from three times as many pairs, in two and a half times as many steps."""

ANCHOR_RATE = "reward.learning_rate=1e-3"
FITTED = ("reward.warmup_pairs=8192", "reward.warmup_learning_rate=3e-4")
"""Both chosen without a run, by held-out pairs; rates.py asks them of a world that no arm is run in."""

_TABLE = (
    Arm(name="rloo", overrides=("reward=vanilla",), paper="RLOO"),
    Arm(name="grpo", overrides=("reward=vanilla", "algo=grpo"), paper="GRPO"),
    Arm(name="remax", overrides=("reward=vanilla", "algo=remax"), paper="ReMax"),
    Arm(
        name="reinforce_pp",
        overrides=("reward=vanilla", "algo=reinforce_pp"),
        paper="REINFORCE++",
    ),
    Arm(name="rloo_r2m", overrides=("reward=r2m",), paper="RLOO+R2M"),
    Arm(name="grpo_r2m", overrides=("reward=r2m", "algo=grpo"), paper="GRPO+R2M"),
    Arm(name="r2m_frozen", overrides=("reward=r2m_frozen",), paper="R2M w/o Train"),
    Arm(name="r2m_noise", overrides=("reward=r2m_noise",), paper="R2M w/ Noise"),
    Arm(name="r2m_no_bt", overrides=("reward=r2m_no_bt",), paper="R2M w/o BT"),
    Arm(name="r2m_no_gre", overrides=("reward=r2m_no_gre",), paper="R2M w/o GRE"),
    Arm(
        name="pretrained_rm",
        overrides=("reward=vanilla",),
        paper="Pretrained RM",
        reward_world=CLEAN_LABELS,
    ),
    Arm(name="good_reward", overrides=("reward=vanilla",), reward_world=GOOD_REWARD),
    Arm(name="better_reward", overrides=("reward=vanilla",), reward_world=BETTER_REWARD),
    Arm(name="rloo_bias_0", overrides=("reward=vanilla",), reward_world=("task.annotator_bias=0.0",)),
    Arm(name="rloo_bias_0.5", overrides=("reward=vanilla",), reward_world=("task.annotator_bias=0.5",)),
    Arm(name="rm_head", overrides=("reward=rm_head",), paper="Iterative RMHead"),
    Arm(name="gold", overrides=("reward=gold",)),
    Arm(name="r2m_oracle", overrides=("reward=r2m_oracle",)),
    Arm(name="r2m_random_labels", overrides=("reward=r2m_random_labels",)),
    Arm(name="refit", overrides=("reward=refit", *FITTED)),
    Arm(name="refit_online", overrides=("reward=refit_online", ANCHOR_RATE)),
    Arm(name="omega_only", overrides=("reward=omega_only",)),
    Arm(name="static_h", overrides=("reward=static_h", *FITTED), without_h="refit"),
    Arm(name="r2m_anchor", overrides=("reward=r2m_anchor", ANCHOR_RATE), without_h="refit_online"),
    Arm(name="r2m_anchor_mixed", overrides=("reward=r2m_anchor_mixed",)),
    Arm(
        name="r2m_anchor_match_frozen",
        overrides=("reward=r2m_anchor", ANCHOR_RATE, "reward.scale=match_frozen"),
    ),
    Arm(
        name="r2m_anchor_mixed_match_frozen",
        overrides=("reward=r2m_anchor_mixed", "reward.scale=match_frozen"),
    ),
    Arm(
        name="r2m_anchor_constant",
        overrides=("reward=r2m_anchor", ANCHOR_RATE, "reward.omega_schedule=constant"),
        without_h="refit_online",
    ),
    Arm(name="r2m_match_frozen", overrides=("reward=r2m_match_frozen",)),
    Arm(name="r2m_detached", overrides=("reward=r2m_detached",)),
    Arm(name="r2m_zero_init", overrides=("reward=r2m_zero_init",)),
    Arm(name="r2m_constant", overrides=("reward=r2m_constant",)),
    Arm(name="r2m_paper_init", overrides=("reward=r2m", "reward.init_std=0.02")),
    Arm(name="rloo_par", overrides=("reward=vanilla", "reward.shape=par")),
    Arm(name="r2m_par", overrides=("reward=r2m_constant", "reward.shape=par")),
    Arm(name="rloo_beta_0.02", overrides=("reward=vanilla", "algo.kl_weight=0.02")),
    Arm(name="rloo_beta_0.1", overrides=("reward=vanilla", "algo.kl_weight=0.1")),
    Arm(name="r2m_beta_0.1", overrides=("reward=r2m", "algo.kl_weight=0.1")),
    Arm(name="refit_beta_0.1", overrides=("reward=refit", *FITTED, "algo.kl_weight=0.1")),
    Arm(
        name="static_h_beta_0.1",
        overrides=("reward=static_h", *FITTED, "algo.kl_weight=0.1"),
        without_h="refit_beta_0.1",
    ),
    Arm(name="r2m_lr_1e-3", overrides=("reward=r2m", "reward.learning_rate=1e-3")),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _TABLE}


def arms_named(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these names, in the table's order and with the baseline; InputError names the nearest."""
    for name in names:
        if name not in ARMS:
            known = ", ".join(ARMS)
            raise InputError(f"no arm {name!r}; there are {known}.{hint(name, [*ARMS])}")
    return tuple(arm for arm in ARMS.values() if arm.name in names or arm.name == BASELINE)
