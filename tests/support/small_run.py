"""The overrides of a run over real models that takes seconds, and the faults that it meets."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = (
    "experiment=demo", "logging=disabled", "prepare.sft_rows=512", "prepare.sft_steps=6",
    "prepare.pair_rows=128", "prepare.reward_steps=4", "algo.prompts_per_step=4",
    "algo.prompts_per_shard=1", "algo.responses_per_prompt=4", "algo.minibatch_prompts=2",
)  # fmt: skip


def ask_for_faults(patch: pytest.MonkeyPatch, evidence: Path, *faults: str) -> None:
    """Let the actors that this process starts meet these faults (see ``r2m_ray.engines.faults``)."""
    patch.setenv("R2M_TESTING", "1")
    patch.setenv("R2M_FAULTS", ",".join(faults))
    patch.setenv("R2M_FAULTS_DIR", str(evidence))
