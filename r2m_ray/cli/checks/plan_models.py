"""Sizes of a run's models, known from their configuration files alone; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
)

from r2m_ray.config.schema import PREPARED, Config, TaskName
from r2m_ray.engines.model_files import local_directory, open_model
from r2m_ray.errors import Problem, refuse
from r2m_ray.tasks.note2answer import world as note2answer

FEED_FORWARD = 4 / 3
"""Width of a prepared model's feed-forward layers, in its widths (``stages.build``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What memory depends on.

    name: directory or hub id. parameters: all of them, tied ones once; largest: those of the largest tensor.
    width, layers, feed_forward, vocabulary: as usual. key_value: numbers that a key and a value take together
    in one layer.
    """

    name: str
    parameters: int
    largest: int
    width: int
    layers: int
    feed_forward: int
    key_value: int
    vocabulary: int


def model_sizes(config: Config) -> tuple[dict[str, ModelSizes], list[Problem]]:
    """Sizes of ``policy``, ``reference`` and ``reward``, and a warning for each that cannot be known here.

    A hub id is looked up in the local cache only. Prepared models that were not made yet are as large as
    `r2m-ray prepare` will make them. Raises InputError for a directory that holds no model.
    """
    names = {
        "policy": config.model.policy,
        "reference": config.model.reference or config.model.policy,
        "reward": config.model.reward,
    }
    sizes: dict[str, ModelSizes] = {}
    problems: list[Problem] = []
    for role, name in names.items():
        field = "model.policy" if name == config.model.policy and role != "reward" else f"model.{role}"
        found = _prepared(config, role) if name == PREPARED else _described(field, name)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sizes[role] = sizes_of(name, found, classifier=role == "reward")
    refuse(problems, "the models")
    return sizes, list(dict.fromkeys(problem for problem in problems if problem.warning))


def sizes_of(name: str, config: PretrainedConfig, *, classifier: bool) -> ModelSizes:
    """Sizes of the model that transformers would build, counted on the meta device: nothing is allocated."""
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    text: Mapping[str, Any] = config.get_text_config().to_dict()
    width, heads = config.get_text_config().hidden_size, config.get_text_config().num_attention_heads
    head_width = text.get("head_dim") or width // heads
    counts = [parameter.numel() for parameter in model.parameters()]
    return ModelSizes(
        name=name,
        parameters=sum(counts),
        largest=max(counts),
        width=width,
        layers=config.get_text_config().num_hidden_layers,
        feed_forward=text.get("intermediate_size") or 4 * width,
        key_value=2 * (text.get("num_key_value_heads") or heads) * head_width,
        vocabulary=config.get_text_config().vocab_size,
    )


def _described(field: str, name: str) -> PretrainedConfig | Problem:
    """The model's own config.json; a problem where there is none, only a warning for a hub id."""
    directory = local_directory(name)
    if directory is not None:
        opened = open_model(field, directory)
        if isinstance(opened, Problem):
            return opened
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if directory is not None:
            return Problem(field, f"{directory}/config.json: {reason}; save the model with save_pretrained")
        message = (
            f"{name} is not in the local cache, so its size is unknown; download it, or name a directory"
        )
        return Problem(field, message, warning=True)


def _prepared(config: Config, role: str) -> PretrainedConfig | Problem:
    """The configuration of the model that `r2m-ray prepare` makes; a BPE vocabulary may turn out smaller."""
    make, task = config.prepare, config.task
    reward = role == "reward"
    preferences = task.name is TaskName.preferences
    vocabulary = make.vocabulary if preferences else len(note2answer.tokenizer())
    width = make.reward_width if reward else make.policy_width
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(FEED_FORWARD * width),
        num_hidden_layers=make.reward_layers if reward else make.policy_layers,
        num_attention_heads=make.reward_heads if reward else make.policy_heads,
        max_position_embeddings=(
            config.reward.max_length if reward else task.max_prompt_tokens + task.max_new_tokens
        ),
        tie_word_embeddings=False,
        num_labels=1,
    )
