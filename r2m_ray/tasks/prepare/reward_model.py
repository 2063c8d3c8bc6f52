"""Training of a reward model on preference pairs by the Bradley–Terry loss, by TRL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from r2m_ray.engines.text import conversation_ids
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.prepare.training import (
    UNTRAINED,
    Trained,
    Training,
    send_no_telemetry,
    shared_arguments,
    train,
    training_order,
)


def fit_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    training: Training,
) -> Trained:
    """Train ``model`` in place by ``−log σ(r_chosen − r_rejected)`` (Eq. 5).

    Conversations are rendered as annotation renders them later, by this tokenizer and its chat template.
    """
    if training.steps == 0:
        return UNTRAINED
    rows = [_row(tokenizer, pair) for pair in pairs]
    order = training_order([max(map(len, row.values())) for row in rows], training)
    dataset = Dataset.from_list([rows[n] for n in order])
    send_no_telemetry()
    with TemporaryDirectory() as scratch:
        arguments = RewardConfig(**shared_arguments(training, Path(scratch)))
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        return train(trainer, "reward model")


def _row(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> dict[str, list[int]]:
    return {
        "chosen_ids": conversation_ids(tokenizer, pair.prompt, pair.chosen),
        "rejected_ids": conversation_ids(tokenizer, pair.prompt, pair.rejected),
    }
