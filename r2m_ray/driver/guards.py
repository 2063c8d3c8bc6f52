"""Numbers that stop a run, because going on would waste or ruin it (``guard``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from r2m_ray.config.schema import GuardConfig
from r2m_ray.core.batch import Annotation, Trajectories
from r2m_ray.errors import RunError, printable

NONFINITE = {
    "reward/nonfinite": "rewards",
    "hidden/nonfinite": "rows of h",
    "policy/nonfinite_rows": "rows with a log-prob",
    "policy/skipped_steps": "losses or gradients of the policy",
    "rm/nonfinite_steps": "losses or gradients of the reward head",
}
"""Metrics that count what was not finite, and what each one counts."""
ROWS_NAMED = 8
PROMPT_SHOWN = 60


class Guards:
    """Reads each step's numbers; every method raises RunError, with the step and the remedy, or returns.

    It remembers the steps in a row that went wrong, and nothing else. A resumed run starts with none.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._nonfinite: list[str] = []

    def rewind(self) -> None:
        """Forget what was seen: the run goes back to a commit."""
        self._nonfinite.clear()

    def versions(self, step: int, trajectories: Sequence[Trajectories]) -> None:
        """Every shard of a step must be sampled with the weights of the step before."""
        for shard, rows in enumerate(trajectories):
            if rows.version != step - 1:
                raise RunError(
                    f"step {step}: shard {shard} was sampled with weights of version {rows.version}, and "
                    f"version {step - 1} was due: its rollout engine missed a weight sync. "
                    "Continue from the last checkpoint with run.resume=true."
                )

    def numbers(
        self,
        step: int,
        metrics: Mapping[str, float],
        trajectories: Sequence[Trajectories],
        annotation: Sequence[Annotation],
    ) -> None:
        """The step's log-prob gap, and how many steps in a row had something that was not finite."""
        gap = metrics["policy/mismatch_mean"]
        if gap > self._config.logprob_gap:
            raise RunError(
                f"step {step}: log-probs of rollout engine and learner are {gap:.3g} nats per token apart "
                f"for weights of version {step - 1}; guard.logprob_gap is {self._config.logprob_gap:g}. The "
                "engine holds other weights than the learner, or computes in another precision: look at "
                "rollout.engine_args, sync with sync.backend=object_store and sync.verify_every=1, or raise "
                "guard.logprob_gap; then continue from the last checkpoint with run.resume=true."
            )
        found = [f"{metrics[key]:g} {what}" for key, what in NONFINITE.items() if metrics.get(key, 0) > 0]
        if not found:
            self._nonfinite.clear()
            return
        rows = "; ".join(_broken_rows(trajectories, annotation)) or "no row by itself: the fault is a model's"
        self._nonfinite.append(f"step {step}: {', '.join(found)} ({rows})")
        if len(self._nonfinite) >= self._config.nonfinite_steps:
            raise RunError(
                f"{len(self._nonfinite)} steps in a row held NaN or infinity, and their updates were skipped "
                f"(guard.nonfinite_steps={self._config.nonfinite_steps}).\n"
                + "\n".join(self._nonfinite)
                + "\nLook at these prompts, lower policy.learning_rate or reward.learning_rate, or use "
                "model.dtype=float32; then continue from the last checkpoint with run.resume=true."
            )


def _broken_rows(trajectories: Sequence[Trajectories], annotation: Sequence[Annotation]) -> Iterator[str]:
    """The step's first rows whose reward or sampled log-prob is not finite, each with its prompt."""
    first, named = 0, 0
    for rows, notes in zip(trajectories, annotation, strict=True):
        broken_N = ~torch.isfinite(notes.reward_N + notes.frozen_reward_N)
        broken_T = rows.action_T & ~torch.isfinite(rows.rollout_logp_T)
        broken_N[rows.layout.row_T[broken_T]] = True
        for n in broken_N.nonzero()[:, 0].tolist():
            if named == ROWS_NAMED:
                yield "…"
                return
            named += 1
            yield f"row {first + n}, prompt '{printable(rows.row_prompts[n][:PROMPT_SHOWN])}'"
        first += rows.layout.rows
