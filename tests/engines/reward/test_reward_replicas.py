"""Two reward replicas over gloo update their heads as one replica with all shards would.

The test starts this file twice as a program, one process per replica.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2m_ray.config.schema import Config, RewardConfig
from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch
from r2m_ray.engines.reward.engine import RewardEngine

K, P, D = 4, 64, 48


def pairs(seed: int, count: int) -> RewardBatch:
    """Human pairs."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.from_lengths(torch.randint(2, 13, (2 * count,), generator=generator).tolist(), 2)
    annotation = Annotation(
        layout=layout,
        reward_N=torch.zeros(2 * count),
        frozen_reward_N=torch.zeros(2 * count),
        gold_N=torch.zeros(2 * count),
        rte_ND=torch.randn(2 * count, D, generator=generator),
        response_id_N=torch.arange(2 * count),
    )
    hidden_TP = torch.randn(layout.tokens, P, generator=generator)
    return RewardBatch(hidden=Hidden(layout=layout, hidden_TP=hidden_TP), annotation=annotation)


def shard(seed: int, *, tied: bool = False, broken: bool = False) -> RewardBatch:
    """Two groups; `tied` makes the first one's rows equal, `broken` puts a NaN into the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (2 * K,), generator=generator)
    rte_ND = torch.randn(2 * K, D, generator=generator)
    response_id_N = torch.arange(2 * K)
    if tied:
        lengths[:K], rte_ND[:K], response_id_N[:K] = 5, rte_ND[0].clone(), 0
    layout = Layout.from_lengths(lengths.tolist(), K)
    hidden_TP = torch.randn(layout.tokens, P, generator=generator)
    if tied:
        hidden_TP[: 5 * K] = hidden_TP[:5].repeat(K, 1)
    if broken:
        hidden_TP[0, 0] = float("nan")
    annotation = Annotation(
        layout=layout,
        reward_N=torch.randn(2 * K, generator=generator),
        frozen_reward_N=torch.randn(2 * K, generator=generator),
        gold_N=torch.randn(2 * K, generator=generator),
        rte_ND=rte_ND,
        response_id_N=response_id_N,
    )
    return RewardBatch(hidden=Hidden(layout=layout, hidden_TP=hidden_TP), annotation=annotation)


# Each update's shards by rank: uneven, a replica without any, one with NaN, and an ordinary one after it.
UPDATES = (
    ([shard(1), shard(2, tied=True)], [shard(3)]),
    ([shard(4)], []),
    ([shard(5)], [shard(6, broken=True)]),
    ([shard(7)], [shard(8), shard(9)]),
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    directories = [tmp_path / "rank0", tmp_path / "rank1"]
    replicas = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny_reward_dir), str(rank), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, directory in enumerate(directories)
    ]
    try:
        for process in replicas:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in replicas:
            process.kill()
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
    replica(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
