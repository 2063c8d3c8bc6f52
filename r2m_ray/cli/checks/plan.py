"""`r2m-ray plan`: what a configuration asks of its machines, without starting anything or loading a weight.

The formulas are in `r2m_ray.cli.checks.memory`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
)

from r2m_ray.cli.checks import memory
from r2m_ray.cli.checks.memory import PROCESS_BYTES, ActorMemory, BatchPlan, ModelSizes
from r2m_ray.cli.checks.preflight import (
    GIB,
    LOCAL,
    NO_CLUSTER,
    disk_problems,
    engine_problems,
    itemsize,
    preflight,
)
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import PREPARED, Config, SyncBackend, TaskName
from r2m_ray.engines.hardware import accelerators
from r2m_ray.engines.model_files import local_directory, open_model
from r2m_ray.errors import Problem, printable, refuse, shown
from r2m_ray.runtime.demand import demands, shortage
from r2m_ray.tasks.note2answer import world as note2answer

FEED_FORWARD = 4 / 3
"""Width of a prepared model's feed-forward layers, in its widths (``tasks.prepare.build``)."""
HUB_SECONDS = 10.0
NODE_GPUS = 8
"""GPUs that a node of a cluster is assumed to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `r2m-ray plan` shows; bytes throughout, upper bounds where lengths vary.

    Everything about memory is empty or 0 where the size of a model is unknown. records: a step's records in
    the object store by kind. store: their sum at its peak, when a new step is sampled beside the last one's
    records, and the weight buckets. sync: weights that travel to each engine in a step. checkpoint: one of
    them; kept: all that are on disk at a time, the one being written included. placement: in sentences.
    """

    batch: BatchPlan
    models: Mapping[str, ModelSizes]
    placement: Sequence[str]
    actors: Sequence[ActorMemory] = ()
    records: Mapping[str, int]
    store: int = 0
    sync: int = 0
    checkpoint: int = 0
    kept: int = 0
    warnings: Sequence[Problem] = ()

    @property
    def host(self) -> int:
        """Memory of all actors, the driver and Ray's processes, without the object store."""
        own = PROCESS_BYTES["driver"] + PROCESS_BYTES["ray"]
        return own + sum(actor.count * actor.host for actor in self.actors)

    def document(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        derived = ("process", "largest_pass", "buffers", "host", "device")
        actors = [asdict(a) | {name: getattr(a, name) for name in derived} for a in self.actors]
        own = {"driver": PROCESS_BYTES["driver"], "ray": PROCESS_BYTES["ray"], "host": self.host}
        warnings = [str(problem) for problem in self.warnings]
        return {**asdict(self), **own, "actors": actors, "warnings": warnings}


def plan(config: Config) -> Plan:
    """Plan a run. Raises InputError for a setting or model directory that no run could use.

    What would only keep `r2m-ray train` from starting now, such as models not prepared yet, is a warning.
    """
    refuse(engine_problems(config), "the configuration")
    models, unknown = model_sizes(config)
    found = Plan(batch=memory.batch_plan(config), models=models, placement=[*placement(config)], records={})
    if not unknown:
        each = memory.checkpoint_bytes(config, models)
        records = memory.record_bytes(config, found.batch, models)
        # A new step is sampled beside the last one's records; h is freed once it is refreshed.
        stale = records["hidden"] if records["fresh_hidden"] else 0
        second = max(0, records["trajectories"] + records["hidden"] - stale)
        through = config.sync.backend is SyncBackend.object_store
        buckets = 2 * memory.bucket_bytes(config, models["policy"]) if through else 0
        found = replace(
            found,
            actors=memory.actor_memory(config, found.batch, models),
            records=records,
            store=sum(records.values()) + second + buckets,
            sync=models["policy"].parameters * itemsize(config.model.dtype),
            checkpoint=each,
            kept=each * (config.checkpoint.keep + 1),
        )
    problems = [*validate(config), *preflight(config), *unknown]
    paths = {problem.path for problem in problems}
    doubts = [problem for problem in _doubts(config, found) if problem.path not in paths]
    return replace(found, warnings=tuple(dict.fromkeys([*problems, *doubts])))


def show(found: Plan, config: Config, *, as_json: bool) -> None:
    """Print a plan as tables or as one JSON object."""
    if as_json:
        print(json.dumps(found.document(), indent=2))
        return
    console = Console(highlight=False)
    console.print(_batch_table(found.batch, config))
    if found.actors:
        own = ", ".join(f"{name} {size(PROCESS_BYTES[name])}" for name in ("driver", "ray"))
        console.print(_memory_table(found.actors))
        console.print(f"all actors ({own} too): {size(found.host)} of memory, without the object store")
    totals = {
        "object store at its peak, two steps meeting": found.store,
        "weights to each engine in a step": found.sync,
        "one checkpoint": found.checkpoint,
        "all checkpoints on the disk at a time": found.kept,
    }
    records = {f"{name.replace('_', ' ')} of a step": size(n) for name, n in found.records.items()}
    rows = records | {name: size(n) or "unknown" for name, n in totals.items()}
    console.print(_table(["records and files", "size"], rows.items()))
    for line in found.placement:
        console.print(f"placement: {line}", markup=False, soft_wrap=True)
    for problem in found.warnings:
        refused = "" if problem.warning else "train will not start: "
        console.print(printable(f"warning: {refused}{problem}"), markup=False, soft_wrap=True)


def model_sizes(config: Config) -> tuple[dict[str, ModelSizes], list[Problem]]:
    """Sizes of ``policy``, ``reference`` and ``reward``, and a warning for each that cannot be known here.

    They come from each model's config.json: its directory's, the local cache's, or the hub's. Prepared models
    that were not made yet are as large as `r2m-ray prepare` will make them. Raises InputError for a directory
    that holds no model.
    """
    names = {"policy": config.model.policy, "reward": config.model.reward}
    if config.model.reference not in (None, config.model.policy):
        names["reference"] = str(config.model.reference)
    found = {
        role: _prepared(config, role) if name == PREPARED else _described(f"model.{role}", name)
        for role, name in names.items()
    }
    problems = [problem for problem in found.values() if isinstance(problem, Problem)]
    refuse(problems, "the models")
    sizes = {
        role: sizes_of(described, classifier=role == "reward")
        for role, described in found.items()
        if not isinstance(described, Problem)
    }
    if "reference" not in names and "policy" in sizes:
        sizes["reference"] = sizes["policy"]
    return sizes, problems


def sizes_of(config: PretrainedConfig, *, classifier: bool) -> ModelSizes:
    """Sizes of the model that transformers would build, counted on the meta device: nothing is allocated."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    described = config.get_text_config()
    text: Mapping[str, Any] = described.to_dict()
    width, heads = described.hidden_size, described.num_attention_heads
    counts = [parameter.numel() for parameter in model.parameters()]
    return ModelSizes(
        parameters=sum(counts),
        largest=max(counts),
        width=width,
        layers=described.num_hidden_layers,
        feed_forward=text.get("intermediate_size") or 4 * width,
        key_value=2 * (text.get("num_key_value_heads") or heads) * (text.get("head_dim") or width // heads),
        vocabulary=described.vocab_size,
    )


def placement(config: Config) -> Iterator[str]:
    """Which roles share nodes, and what one node must have, in sentences."""
    cluster, wanted = config.cluster, demands(config)
    count, total = sum(d.count for d in wanted), sum(d.count * d.gpus for d in wanted)
    needs = f"{count} actors (CPUs {count * cluster.cpus_per_actor:g}, GPUs {total:g})"
    listed = ", ".join(f"{d.role} × {d.count}" for d in wanted)
    if cluster.address in (LOCAL, NO_CLUSTER):
        yield f"all roles share this machine, {needs}: {listed}"
    elif cluster.placement == "STRICT_PACK":
        yield f"all roles share one node ({listed}), which must hold {needs}"
    elif cluster.placement == "STRICT_SPREAD":
        yield f"each of the {count} actors ({listed}) needs a node of its own"
    elif cluster.placement == "SPREAD" or not total:
        yield f"{needs} on any nodes: {listed}; {cluster.placement} decides which"
    else:
        nodes: list[Counter[str]] = []
        free = 0.0
        for role, gpus in ((d.role, d.gpus) for d in wanted for _ in range(d.count)):
            if not nodes or gpus > free:
                nodes, free = [*nodes, Counter()], max(float(NODE_GPUS), gpus)
            nodes[-1][role] += 1
            free -= gpus
        rooms = "; ".join(", ".join(f"{role} × {n}" for role, n in node.items()) for node in nodes)
        yield f"{needs}; on nodes of {NODE_GPUS} GPUs, filled in order, {len(nodes)} nodes: {rooms}"
    if cluster.gpus_per_rollout > 1:
        yield f"an engine's {cluster.gpus_per_rollout:g} GPUs are always on one node"


def size(nbytes: int | None) -> str:
    """Bytes in a unit that fits; empty for none."""
    if not nbytes:
        return "" if nbytes == 0 else "the rest"
    unit, name = next(
        ((u, n) for u, n in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")) if nbytes >= u), (2**10, "KiB")
    )
    return f"{nbytes / unit:.3g} {name}" if nbytes / unit < 1000 else f"{nbytes / unit:.0f} {name}"


def _described(field: str, name: str) -> PretrainedConfig | Problem:
    """The model's own config.json; a problem where there is none, only a warning for a hub id."""
    directory = local_directory(name)
    if directory is not None:
        opened = open_model(field, directory)
        if isinstance(opened, Problem):
            return opened
    try:
        cached = try_to_load_from_cache(name, "config.json") if directory is None else None
        if directory is not None or isinstance(cached, str):
            place = directory or Path(str(cached)).parent
            return AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_bytes(_hub_config(name))
            return AutoConfig.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = shown(str(error).splitlines()[0])
    if directory is not None:
        return Problem(field, f"{directory}/config.json: {reason}; save the model with save_pretrained")
    message = (
        f"{name} is not in the local cache, and its config.json cannot be read from the hub ({reason}), so "
        "its size is unknown; download the model, or name a directory"
    )
    return Problem(field, message, warning=True)


def _hub_config(name: str) -> bytes:
    """config.json of a model of the hub, a kilobyte; OSError or ValueError where it cannot be had."""
    url, token = hf_hub_url(name, "config.json"), get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        reply = get_session().get(url, headers=headers, timeout=HUB_SECONDS, follow_redirects=True)
    except (OSError, ValueError):
        raise
    except Exception as error:
        # Errors of a connection are those of the hub client's HTTP library, which is not ours to name.
        raise OSError(f"{url}: {error}") from error
    hf_raise_for_status(reply)
    return bytes(reply.content)


def _prepared(config: Config, role: str) -> PretrainedConfig:
    """The configuration of the model that `r2m-ray prepare` makes; a BPE vocabulary may turn out smaller."""
    make, task = config.prepare, config.task
    reward, preferences = role == "reward", task.name is TaskName.preferences
    width = make.reward_width if reward else make.policy_width
    positions = config.reward.max_length if reward else task.max_prompt_tokens + task.max_new_tokens
    return LlamaConfig(
        vocab_size=make.vocabulary if preferences else len(note2answer.tokenizer()),
        hidden_size=width,
        intermediate_size=round(FEED_FORWARD * width),
        num_hidden_layers=make.reward_layers if reward else make.policy_layers,
        num_attention_heads=make.reward_heads if reward else make.policy_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        num_labels=1,
    )


def _doubts(config: Config, found: Plan) -> Iterator[Problem]:
    """What will probably fail, or be slow, though the configuration is valid."""
    row, budget = found.batch.row_tokens, config.policy.tokens_per_microbatch
    if budget < row:
        message = f"{budget}, but a row may have {row} tokens, and a row is never split: count on {row}"
        yield Problem("policy.tokens_per_microbatch", message, warning=True)
    if config.cluster.address == LOCAL:
        yield from _machine_doubts(config, found)
    for problem in disk_problems(config, found.checkpoint):
        yield replace(problem, warning=True)


def _machine_doubts(config: Config, found: Plan) -> Iterator[Problem]:
    """What this machine cannot hold, where the run's own cluster is this machine."""
    cluster, total = config.cluster, psutil.virtual_memory().total
    node = {"CPU": float(cluster.cpus), "GPU": float(len(accelerators()))}
    if lacking := shortage(demands(config), [node], cluster.placement):
        message = f"local, and this machine is too small: {lacking}; plan on another, or use fewer replicas"
        yield Problem("cluster.address", message, warning=True)
    store = int(cluster.object_store_gb * GIB)
    if found.store > store:
        message = (
            f"{cluster.object_store_gb:g}, but the records of two steps and the weights on their way "
            f"take up to {size(found.store)}, and what does not fit is spilled to disk; use "
            f"{found.store / GIB * 1.1:.2g}, or fewer algo.prompts_per_step"
        )
        yield Problem("cluster.object_store_gb", message, warning=True)
    needed = found.host + min(found.store, store)
    if needed > total:
        message = (
            f"local, but the run takes up to {size(needed)} and this machine has {size(total)}; use a "
            "larger machine, smaller policy.tokens_per_microbatch, or fewer replicas"
        )
        yield Problem("cluster.address", message, warning=True)


def _batch_table(batch: BatchPlan, config: Config) -> Table:
    """What a step and the run consist of; a count that adds up has its sum over the run."""
    algo = config.algo
    shards = {
        f"  of each {role} replica": f"{least}" if least == most else f"{least} – {most}"
        for role, (least, most) in batch.shards_per_replica.items()
    }
    rows: dict[str, int | str] = {
        "prompts": algo.prompts_per_step,
        f"rows, {algo.responses_per_prompt} of each prompt": batch.rows,
        "tokens": f"{batch.rows:,} – {batch.tokens:,}",
        f"shards of {batch.rows_per_shard} rows": batch.shards,
        **shards,
        "mini-batches of an epoch": f"{batch.minibatches:,}",
        "optimizer steps of the policy": batch.optimizer_steps,
        "forward passes of a learner rank": f"≤ {batch.policy_passes:,}",
        "updates of the R2M head": config.reward.update_steps,
    }
    cells = [
        (name, step, "") if isinstance(step, str) else (name, f"{step:,}", f"{step * algo.steps:,}")
        for name, step in rows.items()
    ]
    return _table(["batches", "a step", "the run"], cells)


def _memory_table(actors: Sequence[ActorMemory]) -> Table:
    """Peak memory of one actor of each role, by what it is for."""
    parts: dict[str, list[int | None]] = {
        "process": [a.process for a in actors],
        "weights": [a.weights for a in actors],
        "gradients": [a.gradients for a in actors],
        "optimizer": [a.optimizer for a in actors],
        "cache": [a.cache for a in actors],
        "largest pass": [a.largest_pass for a in actors],
        "buffers": [a.buffers for a in actors],
        "memory": [a.host for a in actors],
        "memory of each GPU": [a.device for a in actors],
    }
    rows = [(name, *map(size, part)) for name, part in parts.items() if any(part)]
    counts = ("actors", *(f"× {a.count}" for a in actors))
    return _table(["one actor, peak", *(a.role for a in actors)], [*rows, counts])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with numbers in all columns but the first."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
