"""A run that over-optimizes, written through the run log itself."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.run.log import RunLog

HOSTILE = "<script>alert(1)</script> \x1b[2J\u202e & <img src=https://example.org/x>"


def write_run(
    directory: Path, *, planned: int, done: int, gold: bool = True, evaluations: bool = True, every: int = 5
) -> Path:
    """A run that over-optimizes: the proxy keeps rising, gold peaks at a third of the run and falls."""
    config = Config()
    config.run.name, config.algo.steps, config.logging.wandb = "synthetic", planned, WandbMode.disabled
    noise = random.Random(0)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    with RunLog(directory, config=config, resolved_yaml=text, console=Console(file=io.StringIO())) as log:
        if evaluations:
            log.evaluation(0, evaluation_row(0.0, gold=gold))
        for t in range(1, done + 1):
            progress = t / planned
            log.step(t, step_row(progress, noise, gold=gold), rollout_rows(t, progress, gold=gold))
            if evaluations and t % every == 0:
                log.evaluation(t, evaluation_row(progress, gold=gold))
    return directory


def gold_at(progress: float) -> float:
    return 1.2 + 2.4 * progress - 3.6 * progress**2


def evaluation_row(progress: float, *, gold: bool) -> dict[str, float]:
    row = {
        "reward/mean": 0.4 + 2.1 * progress,
        "reward/frozen_mean": 0.4 + 1.5 * progress,
        "kl/sequence": 12 * progress**1.3,
        "kl/token": 0.5 * progress**1.3,
        "response/length_mean": 22 + 9 * progress,
        "response/truncated_fraction": 0.1 * progress,
        "pairs/accuracy": 0.70 + 0.02 * math.sin(6 * progress),
        "pairs/frozen_accuracy": 0.70,
        "pairs/calibration_error": 0.05 + 0.1 * progress,
        "pairs/frozen_calibration_error": 0.05,
        "time/evaluate": 1.3,
    }
    return row | (gold_measures(progress) if gold else {})


def gold_measures(progress: float) -> dict[str, float]:
    row = {"gold/mean": gold_at(progress), "gold/correct": 1.4, "gold/pair_precision": 0.7 - 0.2 * progress}
    for name in ("gold/order_accuracy", "pairs/style_accuracy", "pairs/value_accuracy", "gold/correlation"):
        frozen = name.replace("/", "/frozen_")
        row |= {name: 0.6 - 0.3 * progress, frozen: 0.6 - 0.2 * progress}
    return row


PLAIN = (
    "advantage/std", "response/length_max", "reward/frozen_correlation", "reward/group_entropy",
    "reward/frozen_group_std", "reward/zero_std_groups", "policy/entropy", "policy/clip_fraction_high",
    "policy/clip_fraction_low", "policy/ratio_mean", "policy/ratio_max", "policy/grad_norm",
    "policy/mismatch_mean", "policy/mismatch_max", "rm/bradley_terry", "rm/entropy", "rm/margin",
    "rm/flip_rate", "rm/feedback_ratio", "rm/attention_entropy", "rm/gradient_norm",
    "rm/gradient_norm_bradley_terry", "rm/gradient_norm_entropy",
)  # fmt: skip
"""Metrics that no test asks the course of."""


def step_row(progress: float, noise: random.Random, *, gold: bool) -> dict[str, float]:
    def noisy(value: float) -> float:
        return value * (1 + 0.05 * noise.gauss(0, 1))

    times = {"sample": 0.55, "annotate": 0.11, "policy": 0.48, "reward": 0.07}
    seconds = {f"time/{phase}": noisy(value) for phase, value in times.items()}
    row = {
        **{name: abs(noisy(0.6)) for name in PLAIN},
        "omega": max((math.cos(math.pi * progress) + 1) / 2, 0.6),
        "tokens": 7000.0,
        "response/tokens": 128 * (22 + 9 * progress),
        "response/length_mean": noisy(22 + 9 * progress),
        "response/truncated_fraction": 0.1 * progress,
        "reward/mean": noisy(0.4 + 2.1 * progress),
        "reward/frozen_mean": noisy(0.4 + 1.5 * progress),
        "reward/group_std": noisy(0.6 * (1 + progress)),
        "reward/scale_ratio": noisy(1 + progress),
        "reward/pair_flip_rate": 0.2 * progress,
        "policy/kl_token": 0.5 * progress**1.3,
        "policy/kl_sequence": 12 * progress**1.3,
        **seconds,
        "time/step": sum(seconds.values()) + 0.06,
    }
    if gold:
        row |= {
            "gold/mean": noisy(gold_at(progress)),
            "gold/correlation": 0.6 - 0.5 * progress,
            "gold/frozen_correlation": 0.6 - 0.3 * progress,
            "gold/pair_precision": 0.7 - 0.2 * progress,
        }
    return row


def rollout_rows(step: int, progress: float, *, gold: bool) -> list[dict[str, object]]:
    prompt, response = "the fox is red . tell me about the fox :", "the fox is red . hope this helps !"
    words = [*prompt.split(), *response.split()]
    return [
        {
            "step": step,
            "group": 0,
            "row": row,
            "prompt": prompt,
            "response": f"{response} {HOSTILE}",
            "role": role,
            "reward": 1.5 + progress,
            "frozen_reward": 1.2,
            "omega": 0.8,
            "advantage": 0.3 - row,
            "truncated": row == 2,
            "tokens": 10,
            "gold": 1.4 if gold else None,
            "gold_parts": {"correct": 1.0, "courtesy": 0.4, "wrong": 0.0} if gold else None,
            "attention": [[word, (i % 5) / 36] for i, word in enumerate(words)] if row != 1 else None,
        }
        for row, role in enumerate(("winner", "none", "loser"))
    ]
