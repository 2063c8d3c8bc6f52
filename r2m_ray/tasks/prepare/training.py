"""What TRL's trainers share here: CPU, float32, seeded, silent, nothing written or sent anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub import constants
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from r2m_ray.engines.hardware import usable_cores

WARMUP_SHARE = 0.05
"""Share of the steps in which the learning rate rises; then it falls as a cosine."""
BATCHES_SORTED = 50
"""Batches whose rows are sorted by length together."""
LOGS = 12
"""Losses that are kept of a training, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a stage trains, on how many rows at a time, how fast, and from which seed."""

    steps: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a stage did: seconds it took, and the mean loss up to each of a few steps."""

    seconds: float
    losses: tuple[tuple[int, float], ...]


UNTRAINED = Trained(seconds=0.0, losses=())
"""Zero steps of a stage; transformers would take them for three passes over the data."""


def shared_arguments(training: Training, directory: Path) -> dict[str, Any]:
    """Arguments of TRL's trainers; ``directory`` is where they may write, though nothing is."""
    return {
        "output_dir": str(directory),
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(WARMUP_SHARE * training.steps)),
        "adam_beta2": 0.95,
        "seed": training.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": max(1, training.steps // LOGS),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def training_order(lengths: Sequence[int], training: Training) -> list[int]:
    """Which row comes when, ``steps × batch`` of them: every row once before any comes again.

    Rows of a batch are of like length, so little is padding, and batches of all lengths follow each other at
    random. transformers' own grouping goes from long to short, again and again, which left note2answer's
    policy with a gold of 0.07 where it has 0.55 now, after the same 800 steps.
    """
    random = Random(training.seed)
    count, near = training.steps * training.batch, BATCHES_SORTED * training.batch
    rows: list[int] = []
    while len(rows) < count:
        rows += random.sample(range(len(lengths)), len(lengths))
    order: list[int] = []
    for start in range(0, count, near):
        block = sorted(rows[start : min(start + near, count)], key=lambda row: lengths[row])
        batches = [block[i : i + training.batch] for i in range(0, len(block), training.batch)]
        random.shuffle(batches)
        order += [row for batch in batches for row in batch]
    return order


def train(trainer: Trainer, name: str) -> Trained:
    """Run a trainer on every core and print its progress; ``name`` is what it trains."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(name))
    start = time.monotonic()
    with every_core():
        trainer.train()
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Trained(seconds=time.monotonic() - start, losses=tuple(losses))


@contextmanager
def every_core() -> Iterator[None]:
    """Give torch all cores of this process for a while: nothing else runs beside a stage."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def send_no_telemetry() -> None:
    """Keep TRL's trainers from reporting their use over the network."""
    constants.HF_HUB_DISABLE_TELEMETRY = True


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Prints step, loss and seconds whenever the trainer logs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "loss" in logs:
            seconds = time.monotonic() - self._start
            step = f"step {state.global_step} of {state.max_steps}"
            print(f"{self._name}: {step}, loss {logs['loss']:.3f}, {seconds:.0f} s", flush=True)
