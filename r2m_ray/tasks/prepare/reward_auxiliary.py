"""Pretraining of a reward model's trunk: it learns to count what responses are made of, before any pair.

Axes: N conversations, C counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from r2m_ray.engines.text import conversation_ids
from r2m_ray.tasks.prepare.training import (
    UNTRAINED,
    Trained,
    Training,
    shared_arguments,
    train,
    training_order,
)


def learn_counts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[str, str]],
    count_NC: Sequence[Sequence[float]],
    training: Training,
) -> Trained:
    """Train the trunk of ``model`` in place to predict standardised counts; its score layer is left alone.

    A layer of C outputs in the score layer's place is trained with the trunk by the mean square error, and
    dropped. conversations: prompt and response. count_NC: the counts of each; a constant one teaches nothing.
    """
    if training.steps == 0:
        return UNTRAINED
    target_NC = standardised(torch.tensor(count_NC))
    rows = [conversation_ids(tokenizer, prompt, response) for prompt, response in conversations]
    order = training_order([len(ids) for ids in rows], training)
    dataset = Dataset.from_list([{"input_ids": rows[n], "labels": target_NC[n].tolist()} for n in order])
    with TemporaryDirectory() as scratch:
        arguments = shared_arguments(training, Path(scratch))
        del arguments["max_length"]  # An argument of TRL's trainers alone.
        trainer = Trainer(
            model=_counter(model, target_NC.shape[1]),
            args=TrainingArguments(**arguments),
            train_dataset=dataset,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        return train(trainer, "reward model's trunk")


def standardised(count_NC: Tensor) -> Tensor:
    """Each count minus its mean, divided by its standard deviation where that is not 0."""
    std_C, mean_C = torch.std_mean(count_NC, 0, correction=0)
    return (count_NC - mean_C) / torch.where(std_C > 0, std_C, 1.0)


def _counter(model: PreTrainedModel, counts: int) -> PreTrainedModel:
    """A model of the same trunk, the very modules, with so many outputs."""
    config = deepcopy(model.config)
    config.num_labels, config.problem_type = counts, "regression"
    counter = type(model)(config)
    setattr(counter, counter.base_model_prefix, model.base_model)
    return counter
