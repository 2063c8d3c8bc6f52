"""How prepared models are made: tiny Llamas, supervised fine-tuning, Bradley–Terry, and a measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from r2m_ray.config.schema import Config, TaskName
from r2m_ray.tasks.prepare.materials import Materials, materials
from r2m_ray.tasks.prepare.measurement import mean_gold, policy_scores, reward_accuracy, seeded
from r2m_ray.tasks.prepare.trainers import Training, every_core, fine_tune, fit_preferences

FEED_FORWARD = 4 / 3
"""Width of the feed-forward layers, in its widths: half of Llama's, since attention does the looking up."""

Initialise = Callable[[LlamaForSequenceClassification], None]
"""Changes a reward model in place after its weights are drawn and before it sees a pair."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A model in memory. facts: what is known of its making, JSON-ready."""

    model: PreTrainedModel
    facts: dict[str, Any]


def build(config: Config, directory: Path) -> dict[str, Any]:
    """Train policy and reward model, save them below ``directory``, and return the facts about them."""
    supplies = materials(config)
    return save(
        config, supplies, trained_policy(config, supplies), trained_reward(config, supplies), directory
    )


def save(config: Config, supplies: Materials, policy: Made, reward: Made, directory: Path) -> dict[str, Any]:
    """Save two models below ``directory`` as Hugging Face directories, and measure them.

    Returns:
        The content of ``facts.json``: rows used, training, gold of the policy where the task knows it, and
        accuracy of the reward model on held-out pairs.
    """
    disable_progress_bar()
    for name, made, tokenizer in (
        ("policy", policy, supplies.policy_tokenizer),
        ("reward", reward, supplies.reward_tokenizer),
    ):
        made.model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    facts: dict[str, Any] = {"rows": supplies.counts, "policy": policy.facts, "reward": reward.facts}
    with every_core():
        if config.task.name is TaskName.note2answer:
            scores = policy_scores(config, policy.model, supplies.policy_tokenizer)
            facts["policy"]["gold"] = mean_gold(scores)
        facts["reward"]["accuracy"] = reward_accuracy(config, directory / "reward", supplies.held_out)
    return facts


def trained_policy(config: Config, supplies: Materials) -> Made:
    """A policy of the configuration's shape, drawn from its seed and fine-tuned on the demonstrations."""
    make, tokenizer = config.prepare, supplies.policy_tokenizer
    with seeded(config.run.seed):
        model = LlamaForCausalLM(
            _architecture(
                tokenizer,
                layers=make.policy_layers,
                width=make.policy_width,
                heads=make.policy_heads,
                positions=config.task.max_prompt_tokens + config.task.max_new_tokens,
            )
        )
        training = Training(
            steps=make.sft_steps,
            batch=make.sft_batch,
            learning_rate=make.sft_learning_rate,
            seed=config.run.seed,
        )
        trained = fine_tune(model, tokenizer, supplies.demonstrations, training)
    return Made(model=model, facts={"parameters": model.num_parameters(), **trained.facts()})


def trained_reward(config: Config, supplies: Materials, initialise: Initialise | None = None) -> Made:
    """A reward model of the configuration's shape, drawn from its seed and fitted to the pairs.

    Args:
        config: says shape, steps and seed.
        supplies: the pairs and the tokenizer.
        initialise: called between, under the same seed; None leaves the weights as drawn.
    """
    make, tokenizer = config.prepare, supplies.reward_tokenizer
    with seeded(config.run.seed):
        architecture = _architecture(
            tokenizer,
            layers=make.reward_layers,
            width=make.reward_width,
            heads=make.reward_heads,
            positions=config.reward.max_length,
        )
        architecture.num_labels = 1
        model = LlamaForSequenceClassification(architecture)
        if initialise:
            initialise(model)
        trained = fit_preferences(model, tokenizer, supplies.pairs, reward_training(config))
    return Made(model=model, facts={"parameters": model.num_parameters(), **trained.facts()})


def reward_training(config: Config) -> Training:
    """How a configuration fits its reward model."""
    make = config.prepare
    return Training(
        steps=make.reward_steps,
        batch=make.reward_batch,
        learning_rate=make.reward_learning_rate,
        seed=config.run.seed,
    )


def _architecture(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, heads: int, positions: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=round(FEED_FORWARD * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        # Llama's 0.02 is made for widths in the thousands; here it costs hundreds of steps.
        initializer_range=1 / math.sqrt(width),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
