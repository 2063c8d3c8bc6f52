"""What a finished run left behind, as far as it repeats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from r2m_ray.run.vocabulary import MACHINE_PREFIXES


def rows(directory: Path) -> list[dict[str, Any]]:
    """Every row of a run's metrics, without what the machine decides."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(MACHINE_PREFIXES)}
        for line in lines
    ]


def steps(directory: Path) -> list[dict[str, Any]]:
    return [row for row in rows(directory) if row["kind"] == "step"]


def digests(checkpoint: Path) -> dict[str, str]:
    """sha256 of every tensor file of a checkpoint."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files
    return {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def same_run(one: Path, other: Path, step: int) -> None:
    """Assert equal metrics, texts, policies, heads and optimizers after a step, to the last bit."""
    assert rows(one) == rows(other)
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
    checkpoint = Path("checkpoints") / f"step-{step:06d}"
    found = digests(one / checkpoint)
    assert found == digests(other / checkpoint)
    assert {name.split("/")[0] for name in found} == {"policy", "policy_state", "reward_head"}
    assert any("optim" in name for name in found), sorted(found)
