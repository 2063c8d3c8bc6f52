"""What can go wrong before Ray starts: models, data, run directory and disk, all found at once.

Only files are read, and of models only JSON and headers; an id of the model or data hub is taken as
it is, because asking the hub would make a start depend on the network twice.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from r2m_ray.cli.checks.exposure import exposure_problems
from r2m_ray.config.schema import PREPARED, Config, Dtype, TaskName
from r2m_ray.engines.model_files import ModelFiles, chat_problems, local_directory, open_model
from r2m_ray.engines.policy.deepspeed_config import deepspeed_config
from r2m_ray.errors import InputError, Problem
from r2m_ray.run.checkpoint import CHECKPOINTS, Checkpoints
from r2m_ray.run.lock import LOCK_FILE
from r2m_ray.run.resume import resume_problems

DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:\S+)?")
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip")
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
OPTIMIZER_BYTES = 12
"""Of each parameter in a checkpoint, beside the parameter itself: a float32 copy and two moments."""
LEAST_FREE_BYTES = 256 * 2**20


def preflight(config: Config) -> list[Problem]:
    """Every problem of a training run that can be seen from here, warnings included.

    Raises RunError where a run to be resumed has checkpoints and none is valid.
    """
    problems = [
        *model_problems(config),
        *engine_problems(config),
        *data_problems(config),
        *run_problems(config),
        *exposure_problems(config.cluster),
    ]
    if config.run.resume and all(problem.warning for problem in problems):
        problems += resume_problems(config)
    return problems


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
            # Its tokenizer is another one, so these are not the very tokens it will read.
            problems += _length(reward, config, warning=True)
    if policy and reward and config.task.name is TaskName.preferences:
        problems += chat_problems(policy, reward)
    if reference := models.get("model.reference"):
        problems += _causal(reference)
        problems += _length(reference, config)
        if policy and policy.vocabulary != reference.vocabulary:
            yields = f"vocab_size={reference.vocabulary}, the policy's is {policy.vocabulary}"
            problems.append(reference.problem("config.json", f"{yields}; use a model of the same tokenizer"))
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
        return [
            Problem("run.name", f"{directory} leads outside {root}; remove that link or choose another name")
        ]
    used = directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir())
    if used and not config.run.resume:
        message = f"{directory}: holds a run; continue it with run.resume=true, or choose another run.name"
        return [Problem("run.name", message)]
    if config.run.resume and not used:
        message = f"true, but {directory} holds no run; check run.name and run.root, or leave resume out"
        return [Problem("run.resume", message)]
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written" if existing.is_dir() else "is a file"
        return [Problem("run.root", f"{existing}: {what}; choose another run.root")]
    return [*_disk(existing, config)]


def _directories(config: Config, problems: list[Problem]) -> dict[str, Path]:
    """The local directory of each model; a prepared one that is missing becomes a problem."""
    names = {
        "model.policy": config.model.policy,
        "model.reward": config.model.reward,
        "model.reference": config.model.reference,
    }
    directories = {
        field: directory
        for field, name in names.items()
        if name and name != PREPARED and (directory := local_directory(name))
    }
    # What prepared models are made of includes the data: without it there is nothing to look for.
    if PREPARED in (config.model.policy, config.model.reward) and not data_problems(config):
        from r2m_ray.tasks.prepare.store import locate

        try:
            prepared = locate(config)
        except InputError as error:
            field = "model.policy" if config.model.policy == PREPARED else "model.reward"
            problems.append(Problem(field, str(error)))
            return directories
        if config.model.policy == PREPARED:
            directories["model.policy"] = Path(prepared.policy_dir)
        if config.model.reward == PREPARED:
            directories["model.reward"] = Path(prepared.reward_dir)
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


def _disk(existing: Path, config: Config) -> Iterator[Problem]:
    """Whether the checkpoints to be kept, and the one being written, find room."""
    needed = LEAST_FREE_BYTES
    directory = None if config.model.policy == PREPARED else local_directory(config.model.policy)
    policy = open_model("model.policy", directory) if directory else None
    if isinstance(policy, ModelFiles):
        each = OPTIMIZER_BYTES + (2 if config.model.dtype is Dtype.bfloat16 else 4)
        kept = Path(config.run.root) / config.run.name / CHECKPOINTS
        there = len(Checkpoints(kept, keep=config.checkpoint.keep).committed())
        needed += max(1, config.checkpoint.keep + 1 - there) * policy.parameters * each
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield Problem(
            "run.root",
            f"{existing}: {free / 2**30:.2f} GiB free, but checkpoints need {needed / 2**30:.2f}; free some, "
            "lower checkpoint.keep, or choose another run.root",
        )
