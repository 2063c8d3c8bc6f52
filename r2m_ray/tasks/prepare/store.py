"""Small models trained from scratch for a configuration, kept under a digest of what went into them.

A directory ``<task>-<digest>`` under ``prepare.root`` holds ``policy`` and ``reward`` (Hugging Face
directories, tokenizers included) and ``facts.json``: what they were trained on, for how long, and how
good they are. It is built under a temporary name and renamed, so one with its final name is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r2m_ray.config.fields import names_of
from r2m_ray.config.schema import Config, Prepares, TaskName
from r2m_ray.errors import InputError, RunError

FORMAT = 1
"""Part of the digest; a change of what preparation does must raise it."""
FACTS = "facts.json"
SHARED_FIELDS = names_of("task", Prepares.always)
TASK_FIELDS = {task: names_of("task", Prepares[task.name]) for task in TaskName}
"""Fields of ``config.task`` that prepared models depend on; the files count by their content."""
COMMAND_FIELDS: dict[str, tuple[str, ...]] = {
    "run": names_of("run", Prepares.always),
    "task": (),
    "prepare": (),
    "reward": names_of("reward", Prepares.always),
}
"""What `r2m-ray prepare` must be given where it is not the default; none named means every field."""

Build = Callable[[Config, Path], dict[str, Any]]
"""Makes the models of a configuration in a directory and returns the facts about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Prepared models on disk. facts: the content of ``facts.json``."""

    directory: Path
    facts: Mapping[str, Any]

    @property
    def policy_dir(self) -> Path:
        """Hugging Face directory of the policy and its tokenizer."""
        return self.directory / "policy"

    @property
    def reward_dir(self) -> Path:
        """Hugging Face directory of the reward model and its tokenizer."""
        return self.directory / "reward"


def prepare(
    config: Config, *, added: Mapping[str, Any] | None = None, build: Build | None = None
) -> Prepared:
    """Train policy and reward model for ``config``, unless they are there already.

    Several processes may prepare at once: one trains, the others wait and find its result.

    Args:
        config: what the models are trained on and how.
        added: what else they depend on, where ``build`` has settings of its own; part of the digest.
        build: makes them; None trains both as the configuration says.

    Raises:
        InputError: data cannot serve.
        RunError: the result cannot be written.
    """
    directory = _directory(config, added)
    with _lock(directory):
        if prepared := _complete(directory):
            print(f"found {directory}", flush=True)
            return prepared
        _build(config, added, build or _train, directory)
        if prepared := _complete(directory):
            return prepared
    raise RunError(f"{directory}: its files changed while they were written; prepare again")


def find(config: Config, *, added: Mapping[str, Any] | None = None) -> Prepared | None:
    """What `prepare` made of the same arguments, None where it did not; InputError for unreadable facts."""
    return _complete(_directory(config, added))


def locate(config: Config) -> Prepared:
    """What `r2m-ray prepare` made for ``config``; InputError with the command to run if it did not."""
    prepared = find(config)
    if prepared is None:
        raise InputError(
            f"{_directory(config, None)}: no prepared models for this configuration; make them by: "
            f"{_command(config)}"
        )
    return prepared


def _command(config: Config) -> str:
    """The command line that prepares for ``config``."""
    default = Config()
    words = ["r2m-ray", "prepare"]
    for section, names in COMMAND_FIELDS.items():
        chosen, usual = asdict(config)[section], asdict(default)[section]
        for name in names or chosen:
            value = chosen[name]
            if value != usual[name]:
                words.append(f"{section}.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(words)


def source_digest(source: str) -> str:
    """sha256 of a file's bytes; of its id for a `datasets` dataset, whose content the hub versions."""
    path = Path(source)
    if not path.is_file():
        return hashlib.sha256(source.encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _settings(config: Config, added: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that prepared models depend on; the digest is that of its JSON."""
    task, name = asdict(config.task), config.task.name
    settings = {field: task[field] for field in (*SHARED_FIELDS, *TASK_FIELDS[name])}
    if name is TaskName.preferences:
        sources = {field: task[field] for field in ("train_file", "eval_file") if task[field]}
        settings |= {field: source_digest(source) for field, source in sources.items()}
    prepare = asdict(config.prepare)
    del prepare["root"]
    return {
        "format": FORMAT,
        "seed": config.run.seed,
        "reward.max_length": config.reward.max_length,
        "task": settings,
        "prepare": prepare | dict(added or {}),
    }


def _directory(config: Config, added: Mapping[str, Any] | None) -> Path:
    settings = json.dumps(_settings(config, added), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return Path(config.prepare.root) / f"{config.task.name.value}-{digest[:12]}"


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let one process at a time build ``directory``; the lock ends with its process, however that ends."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".lock-{directory.name}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {directory}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complete(directory: Path) -> Prepared | None:
    """The prepared models in ``directory``, if every file is there in its size."""
    path = directory / FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text())
        sizes = facts["files"].items()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete {directory} and prepare again") from error
    files = [(directory / name, size) for name, size in sizes]
    is_complete = all(file.is_file() and file.stat().st_size == size for file, size in files)
    return Prepared(directory=directory, facts=facts) if is_complete else None


def _train(config: Config, directory: Path) -> dict[str, Any]:
    # TRL takes seconds to import, and every run that only looks for its models would pay them.
    from r2m_ray.tasks.prepare.build import build

    return build(config, directory)


def _build(config: Config, added: Mapping[str, Any] | None, build: Build, directory: Path) -> None:
    building = directory.with_name(f".tmp-{directory.name}")
    start = time.monotonic()
    try:
        # What an interrupted preparation left; the lock says that no process is writing it.
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        facts = {"settings": _settings(config, added), **build(config, building)}
        facts["seconds"] = time.monotonic() - start
        facts["files"] = {
            str(path.relative_to(building)): path.stat().st_size
            for path in sorted(building.rglob("*"))
            if path.is_file()
        }
        (building / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        _sync(building)
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
        _sync(directory.parent, recurse=False)
    except OSError as error:
        raise RunError(
            f"{building}: cannot be written ({error}); free space or choose prepare.root"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sync(directory: Path, *, recurse: bool = True) -> None:
    """Wait until a directory, and what is in it, is on the disk."""
    inside = [*directory.rglob("*")] if recurse else []
    for path in [*inside, directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
