"""The one place that knows which device a role computes on and what its process needs for it."""

from __future__ import annotations

import os
import socket

import ray
import torch

from r2m_ray.config.schema import Config

Address = tuple[str, int]


def device_of(gpus: float) -> torch.device:
    """The device of an actor that was given ``gpus``; Ray makes its GPU the only visible one."""
    return torch.device("cuda", 0) if gpus > 0 else torch.device("cpu")


def actor_environment(config: Config, gpus: float) -> dict[str, str]:
    """Environment variables of an actor's process, set before it imports anything."""
    threads = str(config.cluster.threads_per_actor)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # What a process last said should be about its end.
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore:The given NumPy array is not writable,ignore:Zero-copy tensor",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    }
    if gpus <= 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def free_address() -> Address:
    """An address of this process's node that a collective can meet at."""
    ip: str = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return ip, int(probe.getsockname()[1])


def join_environment(rank: int, world_size: int, address: Address) -> None:
    """Tell this process's collectives who it is and where rank 0 listens."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=address[0],
        MASTER_PORT=str(address[1]),
    )
