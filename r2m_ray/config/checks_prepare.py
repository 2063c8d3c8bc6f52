"""Rules between the fields that say what `r2m-ray prepare` makes."""

from __future__ import annotations

from collections.abc import Iterator

from r2m_ray.config.rule import Rule, near, registrar
from r2m_ray.config.schema import PREPARED, Config, TaskName
from r2m_ray.errors import Problem

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU backend computes."""

RULES: list[Rule] = []
rule = registrar(RULES)


@rule("prepare.policy_width", "prepare.policy_heads", "prepare.reward_width", "prepare.reward_heads")
def _heads(config: Config) -> Iterator[Problem]:
    prepare = config.prepare
    for role, width, heads in (
        ("policy", prepare.policy_width, prepare.policy_heads),
        ("reward", prepare.reward_width, prepare.reward_heads),
    ):
        # Rotary positions turn one half of a head against the other.
        if width % (2 * heads):
            yield Problem(
                f"prepare.{role}_width",
                f"{width} does not give prepare.{role}_heads={heads} heads an even width each; "
                f"use {near(width, 2 * heads)}",
            )


@rule(
    "prepare.reward_from_policy", "prepare.policy", "prepare.policy_layers", "prepare.reward_layers",
    "prepare.policy_width", "prepare.reward_width", "prepare.policy_heads", "prepare.reward_heads",
)  # fmt: skip
def _copied_trunk(config: Config) -> Iterator[Problem]:
    prepare = config.prepare
    if prepare.policy:
        return  # Its shape is its own, and is compared where it is read.
    for name, policy, reward in (
        ("layers", prepare.policy_layers, prepare.reward_layers),
        ("width", prepare.policy_width, prepare.reward_width),
        ("heads", prepare.policy_heads, prepare.reward_heads),
    ):
        if prepare.reward_from_policy and (reward < policy if name == "layers" else reward != policy):
            yield Problem(
                f"prepare.reward_{name}",
                f"{reward}, but with prepare.reward_from_policy=true the trunk is a copy of the policy's; "
                f"use {policy}",
            )


@rule(
    "prepare.reward_auxiliary_steps",
    "prepare.reward_auxiliary_truth",
    "task.name",
    "task.reward_reads_prompt",
)
def _auxiliary(config: Config) -> Iterator[Problem]:
    steps, truth = config.prepare.reward_auxiliary_steps, config.prepare.reward_auxiliary_truth
    if config.task.name is not TaskName.note2answer and steps:
        yield Problem(
            "prepare.reward_auxiliary_steps",
            f"{steps}, but only responses of note2answer can be counted exactly; use 0",
        )
    elif truth and not steps:
        yield Problem(
            "prepare.reward_auxiliary_truth",
            "true, but there is no step to count in; give prepare.reward_auxiliary_steps",
        )
    elif truth and not config.task.reward_reads_prompt:
        yield Problem(
            "prepare.reward_auxiliary_truth",
            "true, but a response alone does not tell right from wrong; use task.reward_reads_prompt=true",
        )


@rule(
    "prepare.policy_width", "prepare.policy_heads", "model.policy", "cluster.gpus_per_rollout",
)  # fmt: skip
def _head_size(config: Config) -> Iterator[Problem]:
    width, heads = config.prepare.policy_width, config.prepare.policy_heads
    sampled_on_cpu = config.model.policy == PREPARED and config.cluster.gpus_per_rollout == 0
    if sampled_on_cpu and width % (2 * heads) == 0 and width // heads not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        closest = min(CPU_HEAD_SIZES, key=lambda size: abs(size - width / heads))
        yield Problem(
            "prepare.policy_width",
            f"{width} gives prepare.policy_heads={heads} heads {width // heads} each, and vLLM's attention "
            f"on a CPU has {sizes}; use {closest * heads}",
        )
