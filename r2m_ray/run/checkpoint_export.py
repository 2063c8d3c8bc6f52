"""A checkpoint's models, taken out for use elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from r2m_ray.errors import InputError, RunError
from r2m_ray.run import commit
from r2m_ray.run.checkpoint import ROLES, fault, step_of


def export(checkpoint: Path, target: Path) -> None:
    """Copy ``policy/`` (a Hugging Face model with its tokenizer) and ``reward_head/`` to a new directory.

    Only files that the manifest lists are copied, and each copy is compared with it; nothing is loaded.
    The result is whole or absent, and has a manifest of its own. Raises InputError where ``target`` exists,
    RunError naming the file for a damaged checkpoint or a failing disk.
    """
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; give a new directory")
    if reason := fault(checkpoint):
        raise RunError(f"{checkpoint}: not exported: {reason}; choose another --step")
    building = commit.temporary(target)
    try:
        building.mkdir(parents=True)
        for name, entry in commit.read_manifest(checkpoint).files.items():
            if name.split("/")[0] in ROLES:
                copy = building / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, copy, follow_symlinks=False)
                if commit.sha256(copy) != entry.sha256:
                    raise RunError(f"{checkpoint / name}: changed while it was copied; export again")
        commit.seal(building, step=step_of(checkpoint))
        commit.publish(building, target)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        raise RunError(f"{target}: not written, {free} bytes are free: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
