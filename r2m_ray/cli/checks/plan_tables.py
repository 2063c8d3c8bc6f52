"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from r2m_ray.cli.checks.plan import Plan
from r2m_ray.cli.checks.plan_memory import PROCESS_BYTES, ActorMemory


def batch_table(plan: Plan) -> Table:
    """What a step and the run consist of."""
    batch = plan.batch
    table = _table("batches", "a step", "the run")
    rows: tuple[tuple[str, object, object], ...] = (
        ("prompts", batch.prompts, batch.prompts * batch.steps),
        (f"rows, {batch.responses_per_prompt} of each prompt", batch.rows, batch.run_rows),
        ("tokens", f"{batch.tokens_least:,} – {batch.tokens_most:,}", ""),
        (f"shards of {batch.rows_per_shard} rows", batch.shards, batch.shards * batch.steps),
        *((f"  of each {role} replica", _span(n), "") for role, n in batch.shards_per_replica.items()),
        ("mini-batches of an epoch", batch.minibatches, ""),
        ("optimizer steps of the policy", batch.optimizer_steps, batch.run_optimizer_steps),
        ("forward passes of a learner rank", f"≤ {batch.policy_passes:,}", ""),
        ("updates of the R2M head", batch.head_updates, batch.run_head_updates),
        ("evaluations", "", batch.evaluations),
        ("checkpoints", "", batch.checkpoints),
    )
    for name, step, run in rows:
        table.add_row(name, _number(step), _number(run))
    return table


def memory_table(plan: Plan) -> Table:
    """Peak memory of one actor of each role, by what it is for."""
    table = _table("one actor, peak", *(actor.role for actor in plan.actors))
    parts: dict[str, Callable[[ActorMemory], int]] = {
        "process": lambda actor: actor.process,
        "weights": lambda actor: actor.weights,
        "gradients": lambda actor: actor.gradients,
        "optimizer": lambda actor: actor.optimizer,
        "cache": lambda actor: actor.cache or 0,
        "working": lambda actor: actor.working,
        "buffers": lambda actor: actor.buffers,
    }
    for name, part in parts.items():
        table.add_row(name, *(size(part(actor)) for actor in plan.actors))
    table.add_section()
    table.add_row("memory", *(size(actor.host) for actor in plan.actors))
    if any(actor.gpu for actor in plan.actors):
        table.add_row("GPU memory", *(_on_gpu(actor) for actor in plan.actors))
    table.add_row("actors", *(f"× {actor.count}" for actor in plan.actors))
    return table


def memory_total(plan: Plan) -> str:
    """What all actors take together, in a sentence."""
    own = ", ".join(f"{name} {size(PROCESS_BYTES[name])}" for name in ("driver", "ray"))
    return f"all actors ({own} too): {size(plan.host)} of memory, without the object store"


def traffic_table(plan: Plan) -> Table:
    """What a step puts into the object store and a checkpoint onto the disk."""
    table = _table("records and files", "size")
    for name, nbytes in plan.records.items():
        table.add_row(f"{name.replace('_', ' ')} of a step", size(nbytes))
    rows = {
        "object store at its peak, two steps meeting": plan.store if plan.records else 0,
        "weights to each engine in a step": plan.sync,
        "one checkpoint": plan.checkpoint,
        "all checkpoints on the disk at a time": plan.kept,
    }
    for name, nbytes in rows.items():
        table.add_row(name, size(nbytes) if nbytes else "unknown")
    return table


def size(nbytes: int) -> str:
    """Bytes in a unit that fits; empty for none."""
    if nbytes == 0:
        return ""
    unit, name = next(
        ((u, n) for u, n in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")) if nbytes >= u), (2**10, "KiB")
    )
    return f"{nbytes / unit:.3g} {name}" if nbytes / unit < 1000 else f"{nbytes / unit:.0f} {name}"


def _table(title: str, *columns: str) -> Table:
    table = Table()
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _span(least_most: tuple[int, int]) -> str:
    least, most = least_most
    return f"{least}" if least == most else f"{least} – {most}"


def _on_gpu(actor: ActorMemory) -> str:
    return f"{size(actor.device)}{' + cache' if actor.cache is None else ''}"
