"""What can go wrong before Ray starts: models, data, run directory, disk and cluster, all reported at once.

Only files are read, and of models only JSON and headers. An id of the model or data hub is accepted as it is:
a start that asks the hub here would depend on the network twice.

Whoever connects to Ray runs code there, unless the cluster asks for a token. The rules are Ray's own (2.59
and later). ``RAY_AUTH_MODE=token`` turns tokens on. Where it is not set, a cluster that a run starts turns
them on by itself, and joining the cluster of this machine (``auto``, without ``RAY_ADDRESS``) does where
there is a token. The token is ``RAY_AUTH_TOKEN``, or the content of the file ``RAY_AUTH_TOKEN_PATH`` or
``~/.ray/auth_token``. A Ray job inherits all of it from the node that it runs on.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from r2m_ray.config.schema import PREPARED, ClusterConfig, Config, Dtype, TaskName
from r2m_ray.engines.model_files import ModelFiles, chat_problems, local_directory, open_model
from r2m_ray.engines.policy.deepspeed_config import deepspeed_config
from r2m_ray.errors import InputError, Problem, shown
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.files import LOCK_FILE
from r2m_ray.run.resume import resume_problems

GIB = 2**30
DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\S+)?")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip")
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
OPTIMIZER_BYTES = 12
"""Of each parameter in a checkpoint, beside the parameter itself: a float32 copy and two moments."""
LEAST_FREE_BYTES = 256 * 2**20
SHARED_MEMORY = Path("/dev/shm")
LARGEST_SLOW_STORE = 10**10
"""Bytes up to which Ray puts an object store on a disk where it does not fit into shared memory."""
SLOW_STORE = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
LOCAL, AUTO, NO_CLUSTER = "local", "auto", "none"
MODE, TOKEN, TOKEN_PATH, ADDRESS = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
UNSAFE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
ACCEPT = "or accept it with cluster.allow_unauthenticated=true"
REMEDY = (
    "set RAY_AUTH_MODE=token here and where the cluster is started (`ray get-auth-token --generate` makes a "
    f"token), {ACCEPT}"
)


def preflight(config: Config) -> list[Problem]:
    """Every problem of a training run that can be seen from here, warnings included.

    Raises RunError where a run to be resumed has checkpoints and none is valid.
    """
    problems = [*evaluation_problems(config), *engine_problems(config), *run_problems(config)]
    if config.run.resume and all(problem.warning for problem in problems):
        problems += resume_problems(config)
    return problems


def evaluation_problems(config: Config) -> list[Problem]:
    """Problems of a run's models, data and cluster."""
    return [
        *model_problems(config),
        *data_problems(config),
        *exposure_problems(config.cluster),
        *store_problems(config.cluster),
    ]


def model_problems(config: Config) -> list[Problem]:
    """Problems of policy, reward model and reference, each alone and with each other."""
    problems: list[Problem] = []
    models: dict[str, ModelFiles] = {}
    for field, directory in _directories(config, problems).items():
        opened = open_model(field, directory)
        if isinstance(opened, Problem):
            problems.append(opened)
        else:
            models[field] = opened
            problems += opened.problems()
    if policy := models.get("model.policy"):
        problems += _causal(policy)
        problems += _length(policy, config)
    if reward := models.get("model.reward"):
        problems += _classifier(reward)
        if config.task.name is TaskName.preferences or config.task.reward_reads_prompt:
            # Its tokenizer is another one, so it will count other tokens than the policy's.
            problems += _length(reward, config, warning=True)
    if policy and reward and config.task.name is TaskName.preferences:
        problems += chat_problems(policy, reward)
    if reference := models.get("model.reference"):
        problems += _causal(reference)
        problems += _length(reference, config)
        if policy and policy.vocabulary != reference.vocabulary:
            sizes = f"vocab_size={reference.vocabulary}, the policy's is {policy.vocabulary}"
            problems.append(reference.problem("config.json", f"{sizes}; use a model of the same tokenizer"))
    return problems


def engine_problems(config: Config) -> list[Problem]:
    """Options passed through to DeepSpeed that contradict a field of ours."""
    try:
        deepspeed_config(config)
    except InputError as error:
        path, _, message = str(error).partition(": ")
        return [Problem(path, message)]
    return []


def data_problems(config: Config) -> list[Problem]:
    """Data files that are missing, unreadable or not what their names say."""
    if config.task.name is not TaskName.preferences:
        return []
    files = {"task.train_file": config.task.train_file, "task.eval_file": config.task.eval_file}
    return [problem for field, name in files.items() if name for problem in _data_file(field, name)]


def run_problems(config: Config) -> list[Problem]:
    """A run directory that ``run.resume`` does not fit, a root that cannot be written, or a full disk."""
    root = Path(config.run.root)
    directory = root / config.run.name
    if root.resolve() not in directory.resolve().parents:
        message = f"{directory} leads outside {root}; remove that link or choose another name"
        return [Problem("run.name", message)]
    used = directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir())
    if used and not config.run.resume:
        message = f"{directory}: holds a run; continue it with run.resume=true, or choose another run.name"
        return [Problem("run.name", message)]
    if config.run.resume and not used:
        message = f"true, but {directory} holds no run; check run.name and run.root, or leave resume out"
        return [Problem("run.resume", message)]
    existing = nearest(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is a file"
        return [Problem("run.root", f"{existing}: {what}; choose another run.root")]
    local = None if config.model.policy == PREPARED else local_directory(config.model.policy)
    policy = open_model("model.policy", local) if local else None
    each = itemsize(config.model.dtype) + OPTIMIZER_BYTES
    return [*disk_problems(config, policy.parameters * each if isinstance(policy, ModelFiles) else 0)]


def disk_problems(config: Config, checkpoint_bytes: int) -> Iterator[Problem]:
    """Whether the checkpoints to be kept, and the one being written, find room; 0 bytes where unknown."""
    directory = Path(config.run.root) / config.run.name
    there = len(Checkpoints(directory / CHECKPOINTS, keep=config.checkpoint.keep).committed())
    needed = LEAST_FREE_BYTES + max(1, config.checkpoint.keep + 1 - there) * checkpoint_bytes
    existing = nearest(directory)
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = (
            f"{existing}: {free / GIB:.2f} GiB free, but checkpoints need {needed / GIB:.2f}; free some, "
            "lower checkpoint.keep, or choose another run.root"
        )
        yield Problem("run.root", message)


def itemsize(dtype: Dtype) -> int:
    """Bytes of one number."""
    return 2 if dtype is Dtype.bfloat16 else 4


def exposure_problems(cluster: ClusterConfig, environment: Mapping[str, str] | None = None) -> list[Problem]:
    """What would let others into the run's cluster; an error, or a warning where the run accepts it.

    environment: this process's own, unless another one is given.
    """
    found = os.environ if environment is None else environment
    problems = []
    fault = _unauthenticated(cluster.address, found)
    if fault:
        problems.append(Problem("cluster.address", fault, warning=cluster.allow_unauthenticated))
    file = _token_file(found)
    is_shared = cluster.address not in (LOCAL, NO_CLUSTER) and TOKEN not in found
    if not fault and is_shared and file.is_file() and file.stat().st_mode & OTHERS:
        problems.append(Problem(str(file), f"others may read this token; chmod 600 {file}", warning=True))
    if found.get(UNSAFE, "0") != "0":
        message = "lets vLLM unpickle what it receives, which can run code; unset it, nothing here needs it"
        problems.append(Problem(UNSAFE, message))
    return problems


def store_problems(cluster: ClusterConfig) -> list[Problem]:
    """An object store of the run's own cluster that Ray would refuse, because shared memory is too small."""
    size = int(cluster.object_store_gb * GIB)
    if cluster.address != LOCAL or size <= LARGEST_SLOW_STORE or os.environ.get(SLOW_STORE):
        return []
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else size
    if size <= free:
        return []
    message = (
        f"{cluster.object_store_gb:g}, but {SHARED_MEMORY} has {free / GIB:.1f} GiB free, and Ray refuses a "
        f"store of over 10 GB that does not fit there; use {max(1, int(0.9 * free / GIB))} or less, or start "
        f"the container with --shm-size={int(1.25 * cluster.object_store_gb)}g or --ipc=host"
    )
    return [Problem("cluster.object_store_gb", message)]


def nearest(directory: Path) -> Path:
    """The directory itself, or the first above it that exists."""
    absolute = directory.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _directories(config: Config, problems: list[Problem]) -> dict[str, Path]:
    """The local directory of each model; a prepared one that is missing becomes a problem."""
    model = config.model
    names = {"model.policy": model.policy, "model.reward": model.reward, "model.reference": model.reference}
    directories = {
        field: directory
        for field, name in names.items()
        if name and name != PREPARED and (directory := local_directory(name))
    }
    prepared = [field for field in ("model.policy", "model.reward") if names[field] == PREPARED]
    # Prepared models depend on the data: without it there is nothing to look for.
    if prepared and not data_problems(config):
        from r2m_ray.tasks.prepare.store import locate

        try:
            found = locate(config)
        except InputError as error:
            problems.append(Problem(prepared[0], str(error)))
            return directories
        made = {"model.policy": Path(found.policy_dir), "model.reward": Path(found.reward_dir)}
        directories |= {field: made[field] for field in prepared}
    return directories


def _causal(model: ModelFiles) -> Iterator[Problem]:
    if model.architecture and not model.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        message = f"architectures is {model.architecture}; use a causal language model"
        yield model.problem("config.json", message)


def _classifier(model: ModelFiles) -> Iterator[Problem]:
    if model.architecture and not model.architecture.endswith("ForSequenceClassification"):
        message = f"architectures is {model.architecture}; use a model for sequence classification"
        yield model.problem("config.json", message)
    elif model.labels != 1:
        message = f"num_labels (id2label) is {model.labels}; use a reward model, trained with num_labels=1"
        yield model.problem("config.json", message)


def _length(model: ModelFiles, config: Config, *, warning: bool = False) -> Iterator[Problem]:
    prompt, response = config.task.max_prompt_tokens, config.task.max_new_tokens
    if model.positions is not None and prompt + response > model.positions:
        yield Problem(
            "task.max_new_tokens",
            f"{response} + task.max_prompt_tokens={prompt} = {prompt + response} tokens, but {model.field} "
            f"reads {model.positions}: max_position_embeddings in {model.directory}/config.json; lower one",
            warning,
        )


def _data_file(field: str, name: str) -> Iterator[Problem]:
    path = Path(name)
    if not path.exists():
        if not DATASET_ID.fullmatch(name) or name.lower().endswith(FILE_SUFFIXES) or path.parent.is_dir():
            yield Problem(field, f"{path}: no such file; give JSONL, Parquet or a datasets id")
        return
    if path.is_dir():
        yield Problem(field, f"{path}: a directory; give one of its files")
        return
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        if path.suffix == ".gz" or start.startswith(GZIP_MAGIC):
            with gzip.open(path) as compressed:
                start = compressed.read(4)
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        yield Problem(field, f"{path}: cannot be read ({reason}); repair or replace the file")
        return
    if not start:
        yield Problem(field, f"{path}: empty; give a file with rows")
    elif path.suffix == ".parquet" and start != PARQUET_MAGIC:
        yield Problem(field, f"{path}: not a Parquet file, whatever its name says; replace it")


def _unauthenticated(address: str, found: Mapping[str, str]) -> str | None:
    """Why the cluster would accept anybody, or would not accept this run; None where neither is the case."""
    mode = found.get(MODE)
    if address == NO_CLUSTER:
        return None
    if address == LOCAL:
        # Ray makes the token of a new cluster itself.
        if mode is None or mode.lower() == "token":
            return None
        return f"local, but {MODE}={shown(mode)} starts the cluster without tokens; unset {MODE}, {ACCEPT}"
    if mode is None and address == AUTO and ADDRESS not in found and _has_token(found):
        return None
    if mode is None or mode.lower() != "token":
        state = "is not set" if mode is None else f"is {shown(mode)}"
        return f"{shown(address)} is joined without a token, because {MODE} {state}; {REMEDY}"
    if not _has_token(found):
        return (
            f"{shown(address)} asks for a token, and there is none; put the cluster's into "
            f"{_token_file(found)} (mode 0600), or into {TOKEN}"
        )
    return None


def _has_token(found: Mapping[str, str]) -> bool:
    file = _token_file(found)
    return bool(found.get(TOKEN)) or (file.is_file() and file.stat().st_size > 0)


def _token_file(found: Mapping[str, str]) -> Path:
    given = found.get(TOKEN_PATH)
    return Path(given) if given else Path(found.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
