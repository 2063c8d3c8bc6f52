"""The one place that knows which device a role computes on and what its process needs for it."""

from __future__ import annotations

import os
import socket

import psutil
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
        # The last lines of a process should be about its end.
        "TQDM_DISABLE": "1",
        # A lost peer fails every call under way; the driver reports it once.
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        "PYTHONWARNINGS": "ignore:The given NumPy array is not writable,ignore:Zero-copy tensor",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    }
    if gpus <= 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def free_address(ip: str | None = None) -> Address:
    """A rendezvous address that is free now: of this process's node, as Ray knows it, or of ``ip``."""
    ip = ip or str(ray.util.get_node_ip_address())
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return ip, int(probe.getsockname()[1])


def join_environment(rank: int, world_size: int, address: Address) -> None:
    """Set what this process's collectives read: its rank, the rendezvous address, its network interface."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=address[0],
        MASTER_PORT=str(address[1]),
    )
    # By itself gloo listens where the host's name resolves to, which on Debian is the loopback interface.
    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(ip: str) -> str | None:
    """The network interface of this machine that holds an address; None where no interface does."""
    held = psutil.net_if_addrs().items()
    return next((name for name, addresses in held if any(a.address == ip for a in addresses)), None)
