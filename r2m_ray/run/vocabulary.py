"""The one vocabulary of metrics: what each name in ``metrics.jsonl`` means, and where it comes from.

A training step and an evaluation name one quantity alike. Terminal, report, monitor, guards, trackers and
`compare` take names from here. Keys below ``time/`` (seconds) and ``memory/`` (bytes) depend on the machine;
all others repeat exactly when a run repeats. A mean over nothing is NaN.

Suffixes: ``frozen_`` is the untouched reward model's share of a quantity; without it the quantity is of the
reward that the run trains on, before scaling and shaping ("own").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Source(StrEnum):
    """Which rows of ``metrics.jsonl`` hold a metric."""

    step = "step"
    evaluation = "evaluation"
    both = "both"


@dataclass(frozen=True, slots=True)
class Metric:
    """One quantity. unit: "1" for a number without a unit. meaning: one sentence."""

    name: str
    unit: str
    meaning: str
    source: Source


MACHINE_PREFIXES = ("time/", "memory/")
"""Keys that start so are measured, not computed, and differ between identical runs."""
TOTAL = "total"
"""Key of a gold score's dictionary that holds the score itself; every other key is a part of it."""

_STEP, _EVAL, _BOTH = Source.step, Source.evaluation, Source.both

METRICS = tuple(
    Metric(name, unit, meaning, source)
    for source, entries in {
        _BOTH: (
            ("reward/mean", "reward", "Mean own reward of the rows."),
            ("reward/frozen_mean", "reward", "Mean score of the frozen reward model."),
            ("reward/frozen_gap", "reward", "Mean of own minus frozen reward."),
            ("reward/std", "reward", "Standard deviation of the own reward over all rows (ddof 0)."),
            ("reward/frozen_std", "reward", "Standard deviation of the frozen score over all rows (ddof 0)."),
            ("reward/group_std", "reward", "Mean standard deviation of the own reward within groups."),
            ("reward/frozen_group_std", "reward", "Mean standard deviation of the frozen score in groups."),
            ("reward/scale_ratio", "1", "reward/group_std divided by reward/frozen_group_std."),
            ("reward/frozen_correlation", "1", "Mean correlation of own and frozen reward within groups."),
            ("reward/group_entropy", "nats", "Mean group reward entropy (Eq. 6) of groups with a spread."),
            ("reward/group_skew", "1", "Mean skew of the own reward within groups with a spread."),
            ("reward/pair_flip_rate", "fraction", "Own pairs that the frozen model puts in the other order."),
            ("reward/zero_std_groups", "fraction", "Groups whose rows all have one own reward."),
            ("reward/nonfinite", "rows", "Rows whose reward, own or frozen, is NaN or infinite."),
            ("hidden/nonfinite", "rows", "Those that the frozen model scores well: h is at fault."),
            ("response/length_mean", "tokens", "Mean sampled tokens of a response, the end token included."),
            ("response/length_max", "tokens", "Sampled tokens of the longest response."),
            ("response/tokens", "tokens", "Sampled tokens of all responses."),
            ("response/truncated_fraction", "fraction", "Responses cut at the length limit."),
            ("response/empty_fraction", "fraction", "Responses of the end token alone."),
            ("gold/mean", "gold", "Mean gold score."),
            ("gold/group_std", "gold", "Mean standard deviation of gold within groups."),
            ("gold/correlation", "1", "Mean correlation of own reward and gold within groups."),
            ("gold/frozen_correlation", "1", "Mean correlation of frozen reward and gold within groups."),
            ("gold/pair_precision", "fraction", "Own pairs whose winner has more gold; ties left out."),
            ("gold/order_accuracy", "fraction", "Pairs in groups that the own reward orders as gold does."),
            ("gold/frozen_order_accuracy", "fraction", "Pairs in groups that the frozen score orders so."),
        ),
        _EVAL: (
            ("kl/sequence", "nats", "KL of the sampled distribution to the reference, per response."),
            ("kl/token", "nats", "The same per sampled token."),
            ("pairs/accuracy", "fraction", "Held-out pairs that the own reward orders as people did."),
            ("pairs/frozen_accuracy", "fraction", "Held-out pairs that the frozen score orders so."),
            ("pairs/calibration_error", "1", "Expected calibration error of the own reward's margins."),
            ("pairs/frozen_calibration_error", "1", "The same of the frozen score's margins."),
        ),
        _STEP: (
            ("omega", "1", "ω(t) of Eq. 4."),
            ("tokens", "tokens", "Input tokens of the step's rows, prompts included."),
            ("advantage/std", "1", "Standard deviation of the advantages (Eq. 1)."),
            ("reward/scale_factor", "1", "What reward.scale multiplies rewards by before advantages."),
            ("reward/greedy_mean", "reward", "Mean own reward of ReMax's greedy rows."),
            ("policy/loss", "1", "Loss of Eq. 2, mean over the optimizer steps."),
            ("policy/policy_loss", "1", "The clipped objective's share of it."),
            ("policy/kl_loss", "1", "The KL penalty's share of it."),
            ("policy/kl_sequence", "nats", "KL by the learner at temperature 1, per response."),
            ("policy/kl_token", "nats", "The same per sampled token."),
            ("policy/entropy", "nats", "Mean −log π_old of the sampled tokens, as sampled."),
            ("policy/mismatch_mean", "nats", "Mean |log-prob of the learner − of the rollout engine|."),
            ("policy/mismatch_kl", "nats", "Mean log-prob of the rollout engine minus the learner's."),
            ("policy/mismatch_max", "nats", "Largest such difference."),
            ("policy/ratio_mean", "1", "Mean importance ratio of Eq. 2."),
            ("policy/ratio_max", "1", "Largest importance ratio."),
            ("policy/clip_fraction_low", "fraction", "Ratios below 1 − clip_low that were clipped."),
            ("policy/clip_fraction_high", "fraction", "Ratios above 1 + clip_high that were clipped."),
            ("policy/old_kl", "nats", "Mean KL of π_old to the updated policy per token."),
            ("policy/grad_norm", "1", "Gradient norm before clipping, mean over the optimizer steps."),
            ("policy/learning_rate", "1", "Learning rate of the last optimizer step."),
            ("policy/tokens", "tokens", "Sampled tokens that statistics are over."),
            ("policy/microbatches", "passes", "Forward passes of one rank."),
            ("policy/optimizer_steps", "steps", "Optimizer steps taken."),
            ("policy/skipped_steps", "steps", "Optimizer steps skipped: loss or gradient not finite."),
            ("policy/nonfinite_rows", "rows", "Rows with a log-prob that is not finite."),
            ("rm/loss", "1", "GREBT (Eq. 7) before the update."),
            ("rm/bradley_terry", "nats", "Bradley–Terry loss (Eq. 5) of the valid pairs."),
            ("rm/entropy", "nats", "Group reward entropy (Eq. 6) of the valid groups."),
            ("rm/margin", "reward", "Winner minus loser under the current head and h."),
            ("rm/flip_rate", "fraction", "Pairs with a negative margin."),
            ("rm/valid_pairs", "fraction", "Groups with a valid pair."),
            ("rm/valid_groups", "fraction", "Groups with a valid entropy."),
            ("rm/group_std", "reward", "Mean standard deviation within groups under the current head and h."),
            ("rm/feedback_ratio", "1", "Mean ‖Ĥ‖/‖H_last‖."),
            ("rm/attention_entropy", "1", "Mean entropy of the attention over the log of the row's length."),
            ("rm/gradient_norm", "1", "Gradient norm of the head before clipping."),
            ("rm/gradient_norm_bradley_terry", "1", "Gradient norm of the unweighted Bradley–Terry loss."),
            ("rm/gradient_norm_entropy", "1", "Gradient norm of the unweighted group reward entropy."),
            ("rm/gradient_norm_human", "1", "Gradient norm of Bradley–Terry on human pairs."),
            ("rm/bradley_terry_human", "nats", "Bradley–Terry loss on human pairs."),
            ("rm/human_accuracy", "fraction", "Human pairs whose preferred row has the higher reward."),
            ("rm/nonfinite_rows", "rows", "Rows whose reward is not finite, now or when annotated."),
            ("rm/nonfinite_steps", "steps", "Head steps skipped: gradient or reward not finite."),
            ("rm/skipped_steps", "steps", "Head steps skipped, those of zero gradient included."),
            ("sync/bytes", "bytes", "Weights sent to each rollout engine."),
            ("sync/buckets", "buckets", "Messages that they were sent in."),
            ("sync/verified", "0 or 1", "Whether digests were compared."),
            ("bytes/driver", "bytes", "Records that the driver read: numbers per row."),
            ("bytes/records", "bytes", "Texts and attention that the driver read for rollouts.jsonl."),
            ("alarm/scale_ratio", "0 or 1", "The own reward's spread outgrew the frozen one's."),
            ("alarm/frozen_gap", "0 or 1", "The own reward rose above the frozen one."),
            ("alarm/flip_rate", "0 or 1", "The frozen model puts many own pairs in the other order."),
            ("alarm/kl", "0 or 1", "The policy is far from the reference."),
        ),
    }.items()
    for name, unit, meaning in entries
)
REGISTRY: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}

FAMILIES: Mapping[str, str] = {
    "gold/": "Mean of a part of the gold score, as the task names it.",
    "pairs/": "Accuracy on counterfactual pairs: ``<kind>_accuracy``, ``frozen_<kind>_accuracy``.",
    "time/": "Seconds of a phase; ``time/step`` is from the first phase's start to the last one's end.",
    "memory/": "Resident memory in bytes.",
}
"""Prefixes of names that depend on the task or the phase, and what such a name means."""

FORMER: Mapping[str, str] = {
    "reward": "reward/mean",
    "reward_nonfinite": "reward/nonfinite",
    "frozen_reward": "reward/frozen_mean",
    "frozen_gap": "reward/frozen_gap",
    "group_std": "reward/group_std",
    "group_std_frozen": "reward/frozen_group_std",
    "scale_ratio": "reward/scale_ratio",
    "group_entropy": "reward/group_entropy",
    "group_skew": "reward/group_skew",
    "pair_flip_rate": "reward/pair_flip_rate",
    "kl_sequence": "kl/sequence",
    "kl_token": "kl/token",
    "length": "response/length_mean",
    "truncated_fraction": "response/truncated_fraction",
    "gold": "gold/mean",
    "gold_correlation": "gold/correlation",
    "gold_correlation_frozen": "gold/frozen_correlation",
    "pseudo_label_precision": "gold/pair_precision",
    "rm_accuracy_on_policy": "gold/order_accuracy",
    "rm_accuracy_on_policy_frozen": "gold/frozen_order_accuracy",
    "rm_accuracy": "pairs/accuracy",
    "rm_accuracy_frozen": "pairs/frozen_accuracy",
    "calibration_error": "pairs/calibration_error",
    "calibration_error_frozen": "pairs/frozen_calibration_error",
}
"""Names in evaluations of earlier versions, and their names today."""
_FORMER_KIND = "rm_accuracy_"


def metric(name: str) -> str:
    """``name`` itself. Code that reads a metric by name takes the name from here, so that an error in it is
    found at import.

    Raises KeyError for a name that no row has.
    """
    if name not in REGISTRY and not name.startswith(tuple(FAMILIES)):
        raise KeyError(f"{name} is not a metric of r2m_ray.run.vocabulary")
    return name


def current_name(name: str) -> str:
    """Today's name of a key of ``metrics.jsonl``, for rows of any version."""
    if name in FORMER:
        return FORMER[name]
    if name.startswith(_FORMER_KIND):
        kind = name.removeprefix(_FORMER_KIND)
        frozen = kind.endswith("_frozen")
        return f"pairs/{'frozen_' if frozen else ''}{kind.removesuffix('_frozen')}_accuracy"
    return name


def current_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``metrics.jsonl`` under today's names."""
    return {current_name(name): value for name, value in row.items()}


def reference() -> str:
    """The reference of all metrics, as Markdown: a table for each kind of row, and the families of names."""
    titles = {
        Source.both: "Training steps and evaluations",
        Source.step: "Training steps",
        Source.evaluation: "Evaluations",
    }
    parts = []
    for source, title in titles.items():
        rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS if m.source is source]
        parts.append("\n".join([f"## {title}", "", "| Name | Unit | Meaning |", "|---|---|---|", *rows]))
    families = [f"- `{prefix}…`: {meaning.replace('``', '`')}" for prefix, meaning in FAMILIES.items()]
    return "\n\n".join([*parts, "\n".join(["## Families of names", "", *families])]) + "\n"
