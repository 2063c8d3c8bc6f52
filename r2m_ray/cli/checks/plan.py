"""What a configuration asks of its machines, worked out without starting anything or loading a weight."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from r2m_ray.cli.checks.plan_batch import BatchPlan, batch_plan
from r2m_ray.cli.checks.plan_memory import PROCESS_BYTES, ActorMemory, actor_memory
from r2m_ray.cli.checks.plan_models import ModelSizes, model_sizes
from r2m_ray.cli.checks.plan_parts import bucket_bytes, feedback_width, head_parameters, itemsize, slot_bytes
from r2m_ray.cli.checks.preflight import engine_problems, preflight
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config, FeedbackRefresh, FeedbackSource
from r2m_ray.errors import Problem, refuse

GIB = 2**30
TEXT_BYTES = 4
"""Characters of a token, about: records carry prompts and responses as text too."""
TRAJECTORY_BYTES = 8 + 8 + 1 + 4
"""Of a packed token: input, label, mask and log-prob."""
REFERENCE_BYTES = 4 + 4
"""Of a packed token: its log-prob at the sampling temperature and at 1."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint, beside the model in its own type: float32 weight and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything `r2m-ray plan` tells; bytes throughout, and upper bounds where lengths vary.

    actors: the roles whose models are known. records: a step's records in the object store by kind, empty
    where a size is unknown; store: their sum at its peak, when a new step is sampled beside the last one's
    records, and the weight buckets. sync: weights that travel to each engine in a step. checkpoint: one of
    them; kept: all that lie on disk at a time, the one being written included.
    """

    batch: BatchPlan
    models: Mapping[str, ModelSizes]
    actors: Sequence[ActorMemory]
    records: Mapping[str, int]
    store: int
    sync: int
    checkpoint: int
    kept: int
    warnings: Sequence[Problem]

    @property
    def host(self) -> int:
        """Memory of all actors, the driver and Ray's processes, without the object store."""
        own = PROCESS_BYTES["driver"] + PROCESS_BYTES["ray"]
        return own + sum(actor.count * actor.host for actor in self.actors)

    def document(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        actors = [{**asdict(a), "host": a.host, "device": a.device} for a in self.actors]
        return {
            "batch": asdict(self.batch),
            "models": {role: asdict(sizes) for role, sizes in self.models.items()},
            "actors": actors,
            "driver": PROCESS_BYTES["driver"],
            "ray": PROCESS_BYTES["ray"],
            "host": self.host,
            "records": dict(self.records),
            "store": self.store,
            "sync": self.sync,
            "checkpoint": self.checkpoint,
            "kept": self.kept,
            "warnings": [str(problem) for problem in self.warnings],
        }


def plan(config: Config) -> Plan:
    """Plan a run. Raises InputError for a setting or model directory that no run could use.

    What would merely keep `r2m-ray train` from starting now, such as models not prepared yet, is a warning.
    """
    refuse(engine_problems(config), "the configuration")
    batch = batch_plan(config)
    models, unknown = model_sizes(config)
    known = "policy" in models and "reward" in models
    records = record_bytes(config, batch, models) if known else {}
    each = checkpoint_bytes(config, models) if known else 0
    bucket = bucket_bytes(config, models["policy"]) if "policy" in models else 0
    found = Plan(
        batch=batch,
        models=models,
        actors=actor_memory(config, batch, models),
        records=records,
        store=_store_peak(config, records) + 2 * bucket,
        sync=models["policy"].parameters * itemsize(config.model.dtype) if "policy" in models else 0,
        checkpoint=each,
        kept=each * (config.checkpoint.keep + 1),
        warnings=(),
    )
    told = [*validate(config), *preflight(config), *unknown]
    paths = {problem.path for problem in told}
    doubts = [problem for problem in _doubts(config, found) if problem.path not in paths]
    return replace(found, warnings=tuple(dict.fromkeys([*told, *doubts])))


def record_bytes(config: Config, batch: BatchPlan, models: Mapping[str, ModelSizes]) -> dict[str, int]:
    """Bytes of a step's records in the object store, rows of full length.

    With T packed tokens, N rows, policy width w and reward width D: trajectories 25·T (text at 4 characters a
    token) + 9·N; hidden T·w·b; fresh_hidden the same where the learner refreshes it; annotation N·(4·D + 20);
    reference 8·T; human_pairs what 2 rows for each group add to trajectories, hidden and annotation.
    """
    hidden = batch.tokens_most * feedback_width(config, models) * itemsize(config.model.dtype)
    refreshed = config.feedback.refresh is not FeedbackRefresh.none
    trajectories = batch.tokens_most * (TRAJECTORY_BYTES + TEXT_BYTES) + 9 * batch.rows
    annotation = batch.rows * (4 * models["reward"].width + 20)
    anchored = config.reward.anchor_fraction > 0
    return {
        "trajectories": trajectories,
        "hidden": hidden,
        "fresh_hidden": hidden if refreshed else 0,
        "annotation": annotation,
        "reference": REFERENCE_BYTES * batch.tokens_most,
        "human_pairs": 2 * (trajectories + hidden + annotation) // batch.responses_per_prompt * anchored,
    }


def checkpoint_bytes(config: Config, models: Mapping[str, ModelSizes]) -> int:
    """Bytes of one checkpoint: the policy in its own type, its exact state, the head and its moments."""
    policy = models["policy"].parameters * (itemsize(config.model.dtype) + STATE_BYTES)
    return policy + STATE_BYTES * head_parameters(config, models)


def _store_peak(config: Config, records: Mapping[str, int]) -> int:
    """The last step's records stay until the next step's are there; h is freed once it is refreshed."""
    if not records:
        return 0
    kept = sum(records.values()) - (records["hidden"] if records["fresh_hidden"] else 0)
    sampled = records["trajectories"] + records["hidden"]
    return max(sum(records.values()), kept + sampled)


def _doubts(config: Config, found: Plan) -> Iterator[Problem]:
    """What will probably go wrong, or slowly, though the configuration is valid."""
    row, budget = found.batch.row_tokens, config.policy.tokens_per_microbatch
    if budget < row:
        message = f"{budget}, but a row may have {row} tokens, and a row is never split: count on {row}"
        yield Problem("policy.tokens_per_microbatch", message, warning=True)
    if config.cluster.address == "local":
        yield from _machine_doubts(config, found)
    if config.cluster.gpus_per_rollout > 0 and "policy" in found.models:
        yield from _gpu_cache_doubts(config, found)
    directory = Path(config.run.root).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < found.kept:
        message = f"{existing}: {_gib(free)} free, but {config.checkpoint.keep + 1} checkpoints take "
        remedy = "; free some, lower checkpoint.keep, or choose another run.root"
        yield Problem("run.root", f"{message}{_gib(found.kept)}{remedy}", warning=True)


def _machine_doubts(config: Config, found: Plan) -> Iterator[Problem]:
    store = int(config.cluster.object_store_gb * GIB)
    if found.store > store:
        needed = found.store / GIB * 1.1
        yield Problem(
            "cluster.object_store_gb",
            f"{config.cluster.object_store_gb:g}, but the records of two steps and the weights on their way "
            f"take up to {_gib(found.store)}, and what does not fit is spilled to disk; use {needed:.2g}, or "
            "fewer algo.prompts_per_step",
            warning=True,
        )
    total = psutil.virtual_memory().total
    needed = found.host + min(found.store, store)
    if needed > total:
        yield Problem(
            "cluster.address",
            f"local, but the run takes up to {_gib(needed)} and this machine has {_gib(total)}; use a larger "
            "machine, smaller policy.tokens_per_microbatch, or fewer replicas",
            warning=True,
        )


def _gpu_cache_doubts(config: Config, found: Plan) -> Iterator[Problem]:
    """vLLM fills its share of the GPU with keys and values; the exported states come on top."""
    model = found.models["policy"]
    keys = model.layers * model.key_value * itemsize(config.model.dtype)
    exported = slot_bytes(config, model) - keys
    share = float(config.rollout.engine_args.get("gpu_memory_utilization", 0.9))
    if config.feedback.source is FeedbackSource.rollout and share * (1 + exported / keys) > 1:
        yield Problem(
            "rollout.engine_args.gpu_memory_utilization",
            f"{share:g}, but hidden states take {exported / keys:.0%} of the KV cache's size beside it; use "
            f"at most {0.97 / (1 + exported / keys):.2f}",
            warning=True,
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
