"""Submit a run to a Ray cluster: what is uploaded is small and known, and your runtime_env stays yours.

    python launch/submit.py --address http://head:8265 -- train experiment=tldr_pythia_2_8b
    cluster=gpu_cluster \
      run.root=/shared/runs task.train_file=/shared/train.jsonl task.eval_file=/shared/test.jsonl

The working tree is uploaded without data, runs, results, checkpoints, virtual environments and caches, after
its size was checked. A runtime_env of your own (``--runtime-env env.yaml``) is merged: its entries win, its
excludes are added to ours. Secrets do not belong into it, because a cluster shows and stores it; set them on
the nodes. A configuration that is wrong, or whose paths only this machine knows, is refused here, before
anything is uploaded.

The exit code is the run's: 0 done, 2 wrong configuration or input, 3 failed or the head is gone, 4 ended by
an alarm, 75 stopped and saved.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from yaml import YAMLError  # type: ignore[import-untyped]

from r2m_ray.config.compose import load_config
from r2m_ray.config.schema import PREPARED, ClusterConfig, Config
from r2m_ray.config.sweep import planned
from r2m_ray.errors import (
    InputError,
    Preempted,
    Problem,
    RunError,
    names_secret,
    printable,
    redacted,
    redacted_command,
    refuse,
)

ROOT = Path(__file__).resolve().parents[1]
EXCLUDES = (
    ".git", ".venv", "venv", "build", "dist", "__pycache__", "*.egg-info", ".env",
    ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis",
    "runs", "prepared", "wandb", "benchmarks/results", "*.safetensors", "*.parquet", "*.jsonl", "*.jsonl.gz",
)  # fmt: skip
"""What is not uploaded: names wherever they lie, and paths from the top; patterns as in .gitignore."""
LARGEST = 8
JOINING = ("train", "evaluate")
"""Commands that compute on the cluster's nodes."""
DATA_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet")
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray lets a stopped job save before it kills it: by itself 3 seconds."""
STOP_MARGIN_S = 60
POLL_S = 2.0
HEAD_SILENCE_S = 60.0
NO_SUCH_COMMAND = 127
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit a command and follow it to its end; returns the exit code of the run."""
    options, command = _arguments(sys.argv[1:] if arguments is None else arguments)
    command = joining(command)
    try:
        configs = checked(command)
        grace_s = max((c.cluster.stop_grace_s for c in configs), default=ClusterConfig().stop_grace_s)
        environment = merged(_read(options.runtime_env), grace_s)
        refuse_secrets(environment, command)
        check_size(Path(environment["working_dir"]), environment["excludes"], options.max_mib)
        entrypoint = shlex.join([options.python, "-m", "r2m_ray", *command])
        if options.dry_run:
            submission = {"entrypoint": entrypoint, "runtime_env": environment}
            print(json.dumps(submission, indent=2, ensure_ascii=False))
            return 0
        client, job = submitted(options.address, entrypoint, environment)
    except InputError as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code
    print(f"submitted as {job}; `ray job stop --address {client.get_address()} {job}` stops and saves it")
    return 0 if options.no_wait else followed(client, job)


def joining(command: Sequence[str]) -> list[str]:
    """The command, made to join the cluster that it is submitted to."""
    named = any(argument.startswith("cluster.address=") for argument in command)
    return [*command, *(["cluster.address=auto"] if command[0] in JOINING and not named else [])]


def checked(command: Sequence[str]) -> list[Config]:
    """The configurations of a `train` or `prepare`; InputError for what is wrong or not on the cluster."""
    overrides = [argument for argument in command[1:] if argument not in ("-m", "--multirun")]
    configs = []
    if command[0] in ("train", "prepare"):
        swept = len(overrides) < len(command) - 1
        configs = planned(overrides)[1] if swept else [load_config(overrides)]
    problems = [
        problem for config in configs for problem in path_problems(config, trains=command[0] == "train")
    ]
    if command[0] not in ("train", "prepare"):
        problems = [
            Problem(
                argument, "is relative to a directory of this machine; give its absolute path on the cluster"
            )
            for argument in command[1:]
            if "=" not in argument and not argument.startswith(("-", "/"))
        ]
    refuse(dict.fromkeys(problems), "what the cluster must find")
    return configs


def path_problems(config: Config, *, trains: bool) -> Iterator[Problem]:
    """Every path that is relative, and so would lead into Ray's copy of the upload, which is not kept."""
    prepares = not trains or PREPARED in (config.model.policy, config.model.reward)
    paths = {"run.root": config.run.root} if trains else {}
    paths |= {"prepare.root": config.prepare.root} if prepares else {}
    data = {"task.train_file": config.task.train_file, "task.eval_file": config.task.eval_file}
    paths |= {field: name for field, name in data.items() if name and _is_file(name)}
    models = {
        "model.policy": config.model.policy,
        "model.reward": config.model.reward,
        "model.reference": config.model.reference,
    }
    paths |= {
        field: name for field, name in models.items() if name and (name[0] in "./~" or Path(name).is_dir())
    }
    for field, value in paths.items():
        if not Path(value).is_absolute():
            yield Problem(
                field,
                f"{value} is relative, so on the cluster it would lie in Ray's copy of the upload, which is "
                "not kept; give the absolute path of a place that every node sees, such as "
                f"{field}=/shared/{Path(value).name}",
            )


def _is_file(name: str) -> bool:
    """Whether a name of data is a file's, and no dataset's on the hub."""
    return name[0] in "./~" or name.lower().endswith(DATA_SUFFIXES) or Path(name).exists()


def submitted(
    address: str | None, entrypoint: str, environment: Mapping[str, Any]
) -> tuple[JobSubmissionClient, str]:
    """The client of the cluster's job server, and the job's id; InputError where the server refuses it."""
    try:
        client = JobSubmissionClient(address)
        return client, str(client.submit_job(entrypoint=entrypoint, runtime_env=dict(environment)))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"--address {address or os.environ.get('RAY_API_SERVER_ADDRESS', '(not given)')}: {error}; check "
            "the address of the cluster's job server (port 8265 of its head), RAY_AUTH_MODE and the token"
        ) from error


def followed(client: JobSubmissionClient, job: str) -> int:
    """Print what a job prints until it ends; returns its exit code, 3 where the head is gone."""
    logs = threading.Thread(target=lambda: asyncio.run(_print_logs(client, job)), daemon=True)
    logs.start()
    answered = time.monotonic()
    try:
        while time.monotonic() - answered < HEAD_SILENCE_S:
            if details := _details(client, job):
                answered = time.monotonic()
                if details.status.is_terminal():
                    logs.join(HEAD_SILENCE_S)
                    return exit_code(details)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"{job} goes on; stop it with `ray job stop`", file=sys.stderr)
        return INTERRUPTED
    print(
        f"error: the head of the cluster ({client.get_address()}) was gone for {HEAD_SILENCE_S:.0f} s, and "
        f"{job} with it. The last commit is kept; continue with run.resume=true on a new cluster.",
        file=sys.stderr,
    )
    return RunError.exit_code


def exit_code(details: JobDetails) -> int:
    """The exit code of a job that has ended: the run's own, 75 for one that was stopped."""
    if details.status is JobStatus.STOPPED:
        print("stopped; submit again with run.resume=true to continue", file=sys.stderr)
        return Preempted.exit_code
    if details.status is JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    if code == NO_SUCH_COMMAND:
        print(
            "error: the cluster's nodes do not find that Python; start Ray there with the environment "
            "active, or name it with --python /path/to/python",
            file=sys.stderr,
        )
    elif code is None:
        print(
            f"error: {printable(redacted(details.message or 'the job failed'), lines=True)}", file=sys.stderr
        )
    # A negative code names the signal that ended the process.
    return code if code is not None and code > 0 else RunError.exit_code


def _details(client: JobSubmissionClient, job: str) -> JobDetails | None:
    """What the job server says about a job; None while the head cannot be reached."""
    server = urlsplit(client.get_address())
    try:
        # The client's own requests have no deadline.
        socket.create_connection((server.hostname or "", server.port or 443), POLL_S).close()
        return client.get_job_info(job)
    except (RuntimeError, OSError):
        return None


async def _print_logs(client: JobSubmissionClient, job: str) -> None:
    try:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
    except (RuntimeError, OSError) as error:
        print(f"the job's log ended early: {printable(str(error))}", file=sys.stderr)


def merged(own: Mapping[str, Any], grace_s: float) -> dict[str, Any]:
    """The user's runtime_env with our excludes, our working tree unless it names one, and time to save."""
    excludes = list(dict.fromkeys([*EXCLUDES, *own.get("excludes", ())]))
    variables = {STOP_WAIT: str(round(grace_s + STOP_MARGIN_S)), **own.get("env_vars", {})}
    return {"working_dir": str(ROOT), **own, "excludes": excludes, "env_vars": variables}


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


def _arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--address", help="the cluster's job server; RAY_API_SERVER_ADDRESS by default")
    parser.add_argument("--runtime-env", type=Path, help="YAML file with a runtime_env to merge")
    parser.add_argument("--python", default="python", help="Python of the cluster's nodes (default: python)")
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
