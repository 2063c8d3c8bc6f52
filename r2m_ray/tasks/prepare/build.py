"""How prepared models are made: tiny Llamas, supervised fine-tuning, Bradley–Terry, and a measurement."""

from __future__ import annotations

import math
from dataclasses import replace
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
from r2m_ray.tasks.note2answer import samples as note2answer_samples
from r2m_ray.tasks.prepare.copied_policy import copied_policy, require_same_trunk
from r2m_ray.tasks.prepare.materials import Materials, materials
from r2m_ray.tasks.prepare.measurement import demonstrated, policy_gold, reward_accuracy, seeded
from r2m_ray.tasks.prepare.reward_auxiliary import learn_counts
from r2m_ray.tasks.prepare.reward_model import fit_preferences
from r2m_ray.tasks.prepare.sft import fine_tune
from r2m_ray.tasks.prepare.training import UNTRAINED, Trained, Training, every_core

FEED_FORWARD = 4 / 3
"""Width of the feed-forward layers, in its widths: half of Llama's, since attention does the looking up."""


def build(config: Config, directory: Path) -> dict[str, Any]:
    """Train policy and reward model, save them below ``directory``, and return the facts about them."""
    disable_progress_bar()
    supplies = materials(config)
    policy, policy_facts = _policy(config, supplies)
    _save(policy, supplies.policy_tokenizer, directory / "policy")
    reward, reward_facts = _reward(config, supplies, policy)
    _save(reward, supplies.reward_tokenizer, directory / "reward")
    facts = {"rows": supplies.counts, "policy": policy_facts, "reward": reward_facts}
    with every_core():
        if config.task.name is TaskName.note2answer:
            policy_facts |= policy_gold(config, policy, supplies.policy_tokenizer)
            facts["demonstrator"] = demonstrated(supplies.demonstrations)
        reward_facts["accuracy"] = reward_accuracy(config, directory / "reward", supplies.held_out)
    return facts


def _policy(config: Config, supplies: Materials) -> tuple[PreTrainedModel, dict[str, Any]]:
    make, tokenizer = config.prepare, supplies.policy_tokenizer
    positions = config.task.max_prompt_tokens + config.task.max_new_tokens
    if make.policy:
        copied = copied_policy(Path(make.policy), tokenizer, positions=positions)
        return copied, _facts(copied, UNTRAINED)
    with seeded(config.run.seed):
        model = LlamaForCausalLM(
            _architecture(
                tokenizer,
                layers=make.policy_layers,
                width=make.policy_width,
                heads=make.policy_heads,
                positions=positions,
            )
        )
        training = Training(
            steps=make.sft_steps,
            batch=make.sft_batch,
            learning_rate=make.sft_learning_rate,
            seed=config.run.seed,
        )
        trained = fine_tune(model, tokenizer, supplies.demonstrations, training)
    return model, _facts(model, trained)


def _reward(
    config: Config, supplies: Materials, policy: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Any]]:
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
        if make.reward_from_policy:
            require_same_trunk(policy.config, architecture)
            model.base_model.load_state_dict(policy.base_model.state_dict(), strict=False)
        training = Training(
            steps=make.reward_steps,
            batch=make.reward_batch,
            learning_rate=make.reward_learning_rate,
            seed=config.run.seed,
        )
        counted = _learn_counts(config, model, supplies, training)
        trained = fit_preferences(model, tokenizer, supplies.pairs, training)
    return model, _facts(model, trained) | {"auxiliary": _progress(counted)}


def _learn_counts(config: Config, model: PreTrainedModel, supplies: Materials, training: Training) -> Trained:
    """Auxiliary pretraining on both responses of every pair."""
    steps, truth = config.prepare.reward_auxiliary_steps, config.prepare.reward_auxiliary_truth
    if steps == 0:
        return UNTRAINED
    texts = [(pair.prompt, text) for pair in supplies.pairs for text in (pair.chosen, pair.rejected)]
    count_NC = [note2answer_samples.counts(*text, truth=truth) for text in texts]
    return learn_counts(model, supplies.reward_tokenizer, texts, count_NC, replace(training, steps=steps))


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


def _facts(model: PreTrainedModel, trained: Trained) -> dict[str, Any]:
    return {"parameters": model.num_parameters(), **_progress(trained)}


def _progress(trained: Trained) -> dict[str, Any]:
    return {
        "seconds": trained.seconds,
        "losses": [{"step": step, "loss": loss} for step, loss in trained.losses],
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
