"""Submit a run to a Ray cluster: what is uploaded is small and known, and your runtime_env stays yours.

    python launch/submit.py --address http://head:8265 -- train experiment=tldr_pythia_2_8b cluster=gpu_node

The working tree is uploaded without data, runs, results, checkpoints, virtual environments and caches,
after its size was checked. A runtime_env of your own (``--runtime-env env.yaml``) is merged: its entries
win, its excludes are added to ours. Secrets do not belong into it, because a cluster shows and stores
it; set them on the nodes. A configuration that is wrong is refused here, before anything is uploaded.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from r2m_ray.config.compose import load_config
from r2m_ray.config.sweep import sweep
from r2m_ray.errors import InputError, names_secret, printable, redacted, redacted_command

ROOT = Path(__file__).resolve().parents[1]
EXCLUDES = (
    ".git", ".venv", "venv", "build", "dist", "__pycache__", "*.egg-info", ".env",
    ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis",
    "runs", "prepared", "wandb", "benchmarks/results", "*.safetensors", "*.parquet", "*.jsonl", "*.jsonl.gz",
)  # fmt: skip
"""What is not uploaded: names wherever they lie, and paths from the top; patterns as in .gitignore."""
LARGEST = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit by ``ray job submit``; returns its exit code, 2 for a mistake found here."""
    options, command = _arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        check_command(command)
        environment = merged(_read(options.runtime_env))
        refuse_secrets(environment, command)
        check_size(Path(environment["working_dir"]), environment["excludes"], options.max_mib)
    except InputError as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code
    submission = submit_command(environment, command, address=options.address, wait=not options.no_wait)
    if options.dry_run:
        print(json.dumps(submission, indent=2, ensure_ascii=False))
        return 0
    return subprocess.run(submission, check=False).returncode


def check_command(command: Sequence[str]) -> None:
    """Refuse a `train` or `prepare` whose configuration is wrong; its models and data lie on the cluster."""
    overrides = [argument for argument in command[1:] if argument not in ("-m", "--multirun")]
    if command[0] in ("train", "prepare"):
        if len(overrides) < len(command) - 1:
            sweep(overrides)
        else:
            load_config(overrides)


def merged(own: Mapping[str, Any]) -> dict[str, Any]:
    """The user's runtime_env with our excludes, and with the working tree unless it names a directory."""
    excludes = list(dict.fromkeys([*EXCLUDES, *own.get("excludes", ())]))
    return {"working_dir": str(ROOT), **own, "excludes": excludes}


def refuse_secrets(environment: Mapping[str, Any], command: Sequence[str]) -> None:
    """Refuse a runtime_env or a command line that names a secret or holds the value of one."""
    places = [f"runtime_env.{path}" for path, value in _leaves(environment) if _is_secret(path, value)]
    hidden = redacted_command(command)
    places += [
        f"argument {i}" for i, pair in enumerate(zip(command, hidden, strict=True), 1) if len({*pair}) > 1
    ]
    if places:
        raise InputError(
            f"{', '.join(places)}: a secret here would be shown and stored by the cluster; set it in the "
            "environment of its nodes, or in a file with mode 0600 there"
        )


def _is_secret(path: str, value: str) -> bool:
    return names_secret(path.rpartition(".")[2]) or redacted(value) != value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value inside nested mappings and lists as text, with its dotted path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, str(value)


def check_size(directory: Path, excludes: Sequence[str], limit_mib: float) -> None:
    """Refuse an upload over the limit, naming the largest files; .gitignore may make the real one smaller."""
    if not directory.is_dir():
        raise InputError(
            f"runtime_env.working_dir: {directory} is no local directory; name one, or leave it out"
        )
    sizes = {path: path.stat().st_size for path in uploaded(directory, excludes)}
    total = sum(sizes.values()) / 2**20
    if total > limit_mib:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
        lines = [f"  {sizes[path] / 2**20:8.1f} MiB  {path.relative_to(directory)}" for path in largest]
        raise InputError(
            "\n".join(
                [
                    f"{directory}: {total:.1f} MiB to upload, the limit is {limit_mib:g}. The largest files:",
                    *lines,
                    "List what is not needed in `excludes` of --runtime-env, or raise --max-mib.",
                ]
            )
        )


def uploaded(directory: Path, excludes: Sequence[str]) -> Iterator[Path]:
    """The files of a directory that no pattern excludes."""
    for parent, directories, files in os.walk(directory):
        here = Path(parent)
        directories[:] = [name for name in directories if not _excluded(here / name, directory, excludes)]
        for name in files:
            path = here / name
            if path.is_file() and not _excluded(path, directory, excludes):
                yield path


def submit_command(
    environment: Mapping[str, Any], command: Sequence[str], *, address: str | None, wait: bool
) -> list[str]:
    """The `ray job submit` command line; the run joins the cluster that it is submitted to."""
    joins = (
        []
        if any(argument.startswith("cluster.address=") for argument in command)
        else ["cluster.address=auto"]
    )
    return [
        *("ray", "job", "submit"),
        *(("--address", address) if address else ()),
        *(() if wait else ("--no-wait",)),
        *("--runtime-env-json", json.dumps(environment)),
        *("--", "python", "-m", "r2m_ray", *command),
        *(joins if command[0] in ("train", "evaluate") else ()),
    ]


def _arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--address", help="the cluster's job server; RAY_API_SERVER_ADDRESS by default")
    parser.add_argument("--runtime-env", type=Path, help="YAML file with a runtime_env to merge")
    parser.add_argument("--max-mib", type=float, default=20, help="largest upload in MiB (default: 20)")
    parser.add_argument("--no-wait", action="store_true", help="return when the job is queued")
    parser.add_argument("--dry-run", action="store_true", help="print the submission instead of making it")
    parser.add_argument("command", nargs="+", help="after --, a command of r2m-ray with its overrides")
    options = parser.parse_args(arguments)
    return options, options.command


def _read(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file}: not a runtime_env ({error}); give a YAML file") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a runtime_env; give a YAML mapping")
    return {str(key): value for key, value in content.items()}


def _excluded(path: Path, directory: Path, excludes: Sequence[str]) -> bool:
    """Whether a pattern names the file or directory: with a slash by its path, without one by its name."""
    relative = path.relative_to(directory).as_posix()
    patterns = [pattern.strip("/") for pattern in excludes]
    return any(fnmatch.fnmatch(relative if "/" in pattern else path.name, pattern) for pattern in patterns)


if __name__ == "__main__":
    sys.exit(main())
