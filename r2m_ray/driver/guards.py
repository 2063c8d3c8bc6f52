"""Guards: numbers that stop a run, because going on would waste or ruin it (``guard``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r2m_ray.config.schema import GuardConfig
from r2m_ray.errors import RunError, printable
from r2m_ray.run.vocabulary import metric

NONFINITE = {
    metric("reward/nonfinite"): "rewards",
    metric("hidden/nonfinite"): "rows of h",
    metric("policy/nonfinite_rows"): "rows with a log-prob",
    metric("policy/skipped_steps"): "losses or gradients of the policy",
    metric("rm/nonfinite_steps"): "losses or gradients of the reward head",
}
"""Metrics that count what was not finite, and what each one counts."""
LOGPROB_GAP = metric("policy/mismatch_mean")
ROWS_NAMED = 8
PROMPT_SHOWN = 60


class Guards:
    """Checks each step's numbers; every method raises RunError, with the step and the remedy, or returns.

    The only state is the latest steps in a row that held NaN or infinity. A resumed run starts with none.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._nonfinite: list[str] = []

    def rewind(self) -> None:
        """Forget every step: the run returned to a checkpoint."""
        self._nonfinite.clear()

    def versions(self, step: int, versions: Sequence[int]) -> None:
        """Every shard of a step must be sampled with the weights of the step before."""
        for shard, version in enumerate(versions):
            if version != step - 1:
                raise RunError(
                    f"step {step}: shard {shard} was sampled with weights of version {version}, and "
                    f"version {step - 1} was due: its rollout engine missed a weight sync. "
                    "Continue from the last checkpoint with run.resume=true."
                )

    def step(self, step: int, metrics: Mapping[str, float], broken_rows: Sequence[str]) -> None:
        """Check the step's log-prob gap, and count the steps in a row that held NaN or infinity."""
        gap = metrics[LOGPROB_GAP]
        if gap > self._config.logprob_gap:
            raise RunError(
                f"step {step}: log-probs of rollout engine and learner are {gap:.3g} nats per token apart "
                f"for weights of version {step - 1}; guard.logprob_gap is {self._config.logprob_gap:g}. The "
                "engine holds other weights than the learner, or computes in another precision: check "
                "rollout.engine_args, sync with sync.backend=object_store and sync.verify_every=1, or raise "
                "guard.logprob_gap; then continue from the last checkpoint with run.resume=true."
            )
        found = [f"{metrics[key]:g} {what}" for key, what in NONFINITE.items() if metrics.get(key, 0) > 0]
        if not found:
            self._nonfinite.clear()
            return
        named = [*broken_rows[:ROWS_NAMED], *(["…"] if len(broken_rows) > ROWS_NAMED else [])]
        rows = "; ".join(named) or "no single row is at fault: a model is"
        self._nonfinite.append(f"step {step}: {', '.join(found)} ({rows})")
        if len(self._nonfinite) >= self._config.nonfinite_steps:
            raise RunError(
                f"{len(self._nonfinite)} steps in a row held NaN or infinity, and their updates were skipped "
                f"(guard.nonfinite_steps={self._config.nonfinite_steps}).\n"
                + "\n".join(self._nonfinite)
                + "\nLook at these prompts, lower policy.learning_rate or reward.learning_rate, or use "
                "model.dtype=float32; then continue from the last checkpoint with run.resume=true."
            )


def row_label(row: int, prompt: str) -> str:
    """Names a row of a step, by its number and the beginning of its prompt, safe to print."""
    return f"row {row}, prompt '{printable(prompt[:PROMPT_SHOWN])}'"
