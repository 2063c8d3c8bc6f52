"""Rules between the fields that say what `r2m-ray prepare` makes."""

from __future__ import annotations

from collections.abc import Iterator

from r2m_ray.config.rule import Rule, near, registrar
from r2m_ray.config.schema import PREPARED, Config
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
