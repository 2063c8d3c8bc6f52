"""Two reward replicas over gloo update their heads as one replica with all shards would.

The test starts this file twice as a program, one process per replica.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from reward_rows import P, broken_at, random_batch
from safetensors.torch import load_file

from r2m_ray.config.schema import Config, RewardConfig
from r2m_ray.core.batch import RewardBatch
from r2m_ray.engines.reward.engine import RewardEngine

pytestmark = pytest.mark.engine


def pairs(seed: int, count: int) -> RewardBatch:
    """Human pairs."""
    return random_batch(seed, groups=count, size=2)


def broken(batch: RewardBatch) -> RewardBatch:
    return replace(batch, hidden=broken_at(batch.hidden, 0))


# Each update's shards by rank: uneven, a replica without any, one with NaN, and an ordinary one after it.
UPDATES = (
    ([random_batch(1), random_batch(2, tied=1)], [random_batch(3)]),
    ([random_batch(4)], []),
    ([random_batch(5)], [broken(random_batch(6))]),
    ([random_batch(7)], [random_batch(8), random_batch(9)]),
)
# Human pairs by rank: of the warm-up's two batches, and of each update; uneven, and a replica without any.
WARM_UP = (([pairs(21, 3)], [pairs(22, 1)]), ([], [pairs(23, 2)]))
HUMAN = (
    ([pairs(31, 2)], [pairs(32, 1)]),
    ([pairs(33, 3)], []),
    ([], [pairs(34, 2)]),
    ([pairs(35, 1)], [pairs(36, 4)]),
)


def engine(model_dir: str, rank: int, world_size: int) -> RewardEngine:
    config = Config(
        reward=RewardConfig(attention_width=16, init_std=0.2, learning_rate=1e-3, anchor_fraction=0.5)
    )
    return RewardEngine(
        config=config,
        model_dir=model_dir,
        policy_width=P,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )


def replica(model_dir: str, rank: int, directory: Path) -> None:
    """Take the warm-up and all updates with this rank's shards, then write head, statistics and digest."""
    reward = engine(model_dir, rank, world_size=2)
    stats = [reward.warm_up(batch[rank], 0.6) for batch in WARM_UP]
    stats += [
        reward.update(shards[rank], 0.6, step, human[rank])
        for step, (shards, human) in enumerate(zip(UPDATES, HUMAN, strict=True))
    ]
    reward.save(directory)
    (directory / "report.json").write_text(json.dumps({"stats": stats, "digest": reward.digests()}))


def test_two_replicas_equal_one(tiny_reward_dir: Path, tmp_path: Path) -> None:
    run_ranks(__file__, tiny_reward_dir, tmp_path)
    directories = [tmp_path / "rank0", tmp_path / "rank1"]
    reports = [json.loads((directory / "report.json").read_text()) for directory in directories]

    alone = engine(str(tiny_reward_dir), 0, world_size=1)
    stats = [alone.warm_up([*left, *right], 0.6) for left, right in WARM_UP]
    stats += [
        alone.update([*left, *right], 0.6, step, [*human[0], *human[1]])
        for step, ((left, right), human) in enumerate(zip(UPDATES, HUMAN, strict=True))
    ]
    assert reports[0]["digest"] == reports[1]["digest"]
    assert [s["skipped_steps"] for s in stats] == [0, 0, 0, 0, 1, 0]
    assert [s["valid_pairs"] for s in stats[2:]] == [5 / 6, 1, 1, 1]
    for report in reports:
        for found, expected in zip(report["stats"], stats, strict=True):
            assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
    heads = load_file(directories[0] / "reward_head" / "head.safetensors")
    for name, value in alone.head.named_parameters():
        torch.testing.assert_close(heads[name], value.detach(), atol=1e-6, rtol=0)


if __name__ == "__main__":
    rank = int(sys.argv[3])
    replica(sys.argv[1], rank, Path(sys.argv[2]) / f"rank{rank}")
