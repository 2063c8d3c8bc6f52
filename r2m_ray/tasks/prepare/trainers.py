"""Training of prepared models by TRL: on the CPU, in float32, seeded; nothing is written or sent anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from r2m_ray.engines.hardware import usable_cores
from r2m_ray.engines.text import conversation_ids, policy_prompt_ids, policy_response_ids
from r2m_ray.tasks.data import PreferencePair

WARMUP_SHARE = 0.05
"""Share of the steps in which the learning rate rises; then it falls as a cosine."""
BATCHES_SORTED = 50
"""Batches whose rows are sorted by length together."""
LOGS = 12
"""Losses that are kept of a training, about."""
IGNORED = -100
"""Label of a token that the loss leaves out."""

# TRL's trainers would report their use over the network.
constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a model trains, on how many rows at a time, how fast, and from which seed."""

    steps: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training did: seconds it took, and the mean loss up to each of a few steps."""

    seconds: float
    losses: tuple[tuple[int, float], ...]

    def facts(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        return {
            "seconds": self.seconds,
            "losses": [{"step": step, "loss": loss} for step, loss in self.losses],
        }


UNTRAINED = Trained(seconds=0.0, losses=())
"""Zero steps; transformers would take them for three passes over the data."""


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[tuple[str, str]],
    training: Training,
) -> Trained:
    """Train ``model`` in place to continue prompts as their responses do, end token included.

    Only response tokens count: with the prompts' own tokens in the loss, note2answer's policy had learned
    to look up 15 % of its facts where it now knows 80 %, after the same 300 steps. A demonstration is a
    prompt and a response.
    """
    if training.steps == 0:
        return UNTRAINED
    rows = []
    for prompt, response in demonstrations:
        start, end = policy_prompt_ids(tokenizer, prompt), policy_response_ids(tokenizer, response)
        rows.append({"input_ids": start + end, "labels": [IGNORED] * len(start) + end})
    order = training_order([len(row["input_ids"]) for row in rows], training)
    dataset = Dataset.from_list([rows[n] for n in order])
    with TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            **shared_arguments(training, scratch),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        return train(trainer, "policy")


def fit_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    training: Training,
) -> Trained:
    """Train ``model`` in place by the Bradley–Terry loss ``−log σ(r_chosen − r_rejected)`` (Eq. 5).

    Conversations are rendered by the tokenizer and its chat template, as annotation renders them later.
    """
    if training.steps == 0:
        return UNTRAINED
    rows = [
        {
            "chosen_ids": conversation_ids(tokenizer, pair.prompt, pair.chosen),
            "rejected_ids": conversation_ids(tokenizer, pair.prompt, pair.rejected),
        }
        for pair in pairs
    ]
    order = training_order([max(map(len, row.values())) for row in rows], training)
    dataset = Dataset.from_list([rows[n] for n in order])
    with TemporaryDirectory() as scratch:
        arguments = RewardConfig(**shared_arguments(training, scratch), max_length=None)
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        return train(trainer, "reward model")


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


def shared_arguments(training: Training, directory: str) -> dict[str, Any]:
    """Arguments of every trainer here; ``directory`` is where it may write, though it writes nothing."""
    return {
        "output_dir": directory,
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
        "logging_steps": max(1, training.steps // LOGS),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


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
    """Give torch all cores of this process for a while: nothing else runs beside a preparation."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Prints step, loss and seconds whenever the trainer logs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" in logs:
            seconds = time.monotonic() - self._start
            step = f"step {state.global_step} of {state.max_steps}"
            print(f"{self._name}: {step}, loss {logs['loss']:.3f}, {seconds:.0f} s", flush=True)
