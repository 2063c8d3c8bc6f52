"""Two learner ranks over gloo equal one, in every ZeRO stage, and resume to the last bit.

The module starts this file twice as a program, one process per rank; each goes through all variants.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_rows import BATCHES, IDS, learner, learner_config, weights
from models import save_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_ray.config.schema import Config, Dtype
from r2m_ray.engines.policy import causal

pytestmark = pytest.mark.engine

Stats = dict[str, float]

VARIANTS = {
    "0-float32": (0, Dtype.float32),
    "2-float32": (2, Dtype.float32),
    "3-float32": (3, Dtype.float32),
    "3-recomputed": (3, Dtype.float32),  # With gradient checkpointing, and tokens scored in 4 chunks.
    "1-bfloat16": (1, Dtype.bfloat16),
    "2-bfloat16": (2, Dtype.bfloat16),
    "3-bfloat16": (3, Dtype.bfloat16),
}
# Mini-batch 0 holds shards 0 and 1; mini-batch 1 holds shard 2 only, so that rank 1 has nothing of it.
SHARDS = {0: (0, 2), 1: (1,)}
STATES = "states.safetensors"


def run_variant(config: Config, model_dir: Path, rank: int, directory: Path) -> dict[str, Stats]:
    """Update, save, update twice; resume and update twice; then an update that is broken on rank 1."""
    ids = SHARDS[rank]
    mine = [BATCHES[i] for i in ids]
    policy = learner(config, model_dir, rank, 2)
    report = {}
    report["first"], states = policy.update(mine, ids)
    found = {f"shard{i}": shard.hidden_TP for i, shard in zip(ids, states, strict=True)}
    for shard in policy.hidden([mine[0].trajectories] if rank == 0 else []):
        found["after"] = shard.hidden_TP
    save_file(found, directory / f"rank{rank}-{STATES}")
    first = weights(policy)
    policy.save(directory)
    policy.update(mine, ids)
    report["third"], _ = policy.update(mine, ids)
    third = weights(policy)

    resumed = learner(config, model_dir, rank, 2)
    resumed.load(directory)
    resumed.update(mine, ids)
    report["resumed"], _ = resumed.update(mine, ids)
    left = {"first": first, "third": third, "resumed": weights(resumed)}

    if rank == 1:
        mine = [replace(mine[0], advantage_N=mine[0].advantage_N * torch.nan)]
    report["broken"], _ = resumed.update(mine, ids)
    for name, tensors in left.items():
        if rank == 0:
            save_file(tensors, directory / f"{name}.safetensors")
        # Buckets are gathered in lockstep, so every rank has to make the same ones.
        assert len(tensors) == len(policy.weight_shapes())
    return report


def rank_program(root: Path, rank: int) -> None:
    for name, (stage, dtype) in VARIANTS.items():
        config = learner_config(stage)
        config.model.dtype = dtype
        config.policy.gradient_checkpointing = name.endswith("recomputed")
        causal.LOGITS_AT_ONCE = 64 * 160 // (4 if name.endswith("recomputed") else 1)
        directory = root / name
        directory.mkdir(exist_ok=True)
        report = run_variant(config, root / "model", rank, directory)
        (directory / f"rank{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model and what both ranks left of each variant."""
    directory = tmp_path_factory.mktemp("ranks")
    # An odd width: two ranks cannot halve its norms, so ZeRO-3 pads the last partition.
    save_model(
        directory / "model",
        seed=7,
        width=21,
        heads=3,
        head_dim=8,
        num_key_value_heads=1,
    )
    run_ranks(__file__, directory)
    return directory


def reports(root: Path, variant: str) -> tuple[dict[str, Stats], dict[str, Stats]]:
    first, second = (json.loads((root / variant / f"rank{rank}.json").read_text()) for rank in SHARDS)
    return first, second


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_agree_and_resume_exactly(root: Path, variant: str) -> None:
    ours, theirs = reports(root, variant)
    assert ours == theirs
    assert ours["resumed"] == ours["third"]
    third, resumed = (load_file(root / variant / f"{name}.safetensors") for name in ("third", "resumed"))
    for name, tensor in third.items():
        assert torch.equal(resumed[name], tensor), name
    first = load_file(root / variant / "first.safetensors")
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])
    # Both epochs' steps on mini-batch 0 were skipped, on both ranks, and those on mini-batch 1 taken.
    assert (ours["broken"]["skipped_steps"], ours["broken"]["optimizer_steps"]) == (2, 2)


@pytest.fixture(scope="module")
def alone(root: Path, one_rank: None) -> tuple[Stats, dict[str, Tensor], dict[str, Tensor]]:
    """Statistics, weights and states of one rank that holds all shards."""
    policy = learner(learner_config(0), root / "model")
    stats, states = policy.update(BATCHES, IDS)
    found = {f"shard{i}": shard.hidden_TP for i, shard in enumerate(states)}
    found["after"] = policy.hidden([BATCHES[0].trajectories])[0].hidden_TP
    return stats, weights(policy), found


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.endswith("bfloat16")])
def test_two_ranks_equal_one(
    variant: str, root: Path, alone: tuple[Stats, dict[str, Tensor], dict[str, Tensor]]
) -> None:
    stats, expected, states = alone
    directory = root / variant
    found = reports(root, variant)[0]["first"]
    # Two ranks need fewer passes for the same tokens.
    assert found["microbatches"] < stats["microbatches"]
    assert found | {"microbatches": 0} == pytest.approx(stats | {"microbatches": 0}, rel=1e-4, abs=1e-6)
    for name, tensor in load_file(directory / "first.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    shards = {n: t for rank in SHARDS for n, t in load_file(directory / f"rank{rank}-{STATES}").items()}
    assert shards.keys() == states.keys()
    for name, tensor in shards.items():
        torch.testing.assert_close(tensor, states[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_moves_to_another_stage_and_number_of_ranks(stage: int, root: Path, one_rank: None) -> None:
    saved = root / "3-float32"
    policy = learner(learner_config(stage), root / "model")
    policy.load(saved)
    for name, tensor in load_file(saved / "first.safetensors").items():
        assert torch.equal(weights(policy)[name], tensor), name
    policy.update(BATCHES, IDS)
    policy.update(BATCHES, IDS)
    for name, tensor in load_file(saved / "third.safetensors").items():
        torch.testing.assert_close(weights(policy)[name], tensor, atol=1e-5, rtol=0)


if __name__ == "__main__":
    rank_program(Path(sys.argv[1]), int(sys.argv[2]))
