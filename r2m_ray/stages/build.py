"""How prepared models are made: tiny Llamas, supervised fine-tuning, Bradley–Terry, and a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from r2m_ray.config import Config, TaskName
from r2m_ray.data import PreferencePair
from r2m_ray.models.reward_trunk import RewardTrunk
from r2m_ray.stages.materials import Materials, materials
from r2m_ray.stages.reward_model import fit_preferences
from r2m_ray.stages.sft import fine_tune
from r2m_ray.stages.training import Trained, Training, every_core
from r2m_ray.tasks import note2answer
from r2m_ray.tasks.note2answer_gold import gold

FEED_FORWARD = 4 / 3
"""Width of the feed-forward layers, in its widths: half of Llama's, since attention does the looking up."""
GOLD_PROMPTS = 256
"""note2answer: held-out prompts on which a prepared policy is measured."""


def build(config: Config, directory: Path) -> dict[str, Any]:
    """Train policy and reward model, save them below ``directory``, and return the facts about them."""
    disable_progress_bar()
    supplies = materials(config)
    policy, policy_facts = _policy(config, supplies)
    _save(policy, supplies.policy_tokenizer, directory / "policy")
    reward, reward_facts = _reward(config, supplies)
    _save(reward, supplies.reward_tokenizer, directory / "reward")
    with every_core():
        if config.task.name is TaskName.note2answer:
            policy_facts |= policy_gold(config, policy, supplies.policy_tokenizer)
        reward_facts["accuracy"] = reward_accuracy(config, directory / "reward", supplies.held_out)
    return {"rows": supplies.counts, "policy": policy_facts, "reward": reward_facts}


def policy_gold(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Mean gold of a note2answer policy on held-out prompts, sampled at temperature 1 and greedy."""
    prompts = note2answer.prompts(config.run.seed, "held-out", GOLD_PROMPTS, config.task.values_per_attribute)
    prompt_ids = torch.tensor(tokenizer([*prompts]).input_ids)
    means = {}
    with seeded(config.run.seed):
        for name, sampled in (("gold", True), ("gold_greedy", False)):
            output = policy.eval().generate(
                prompt_ids,
                max_new_tokens=config.task.max_new_tokens,
                do_sample=sampled,
                top_k=0 if sampled else None,
            )
            rows = output[:, prompt_ids.shape[1] :].tolist()
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            cut = [tokenizer.eos_token_id not in row for row in rows]
            scores = [gold(*row).total for row in zip(prompts, texts, cut, strict=True)]
            means[name] = sum(scores) / len(scores)
    return means


def reward_accuracy(config: Config, directory: Path, pairs: Sequence[PreferencePair]) -> float:
    """Share of pairs whose chosen response a saved reward model scores higher, read as annotation will."""
    trunk = RewardTrunk(
        model_dir=str(directory),
        dtype=torch.float32,
        attention=config.model.attention,
        score_layer="score",
        max_length=config.reward.max_length,
        tokens_per_microbatch=config.reward.tokens_per_microbatch,
        device=torch.device("cpu"),
    )
    prompts = [pair.prompt for pair in pairs]
    _, chosen_N = trunk.read(prompts, [pair.chosen for pair in pairs])
    _, rejected_N = trunk.read(prompts, [pair.rejected for pair in pairs])
    return float((chosen_N > rejected_N).double().mean())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a while: initial weights and sampling draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _policy(config: Config, supplies: Materials) -> tuple[PreTrainedModel, dict[str, Any]]:
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
    return model, _facts(model, trained)


def _reward(config: Config, supplies: Materials) -> tuple[PreTrainedModel, dict[str, Any]]:
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
        training = Training(
            steps=make.reward_steps,
            batch=make.reward_batch,
            learning_rate=make.reward_learning_rate,
            seed=config.run.seed,
        )
        trained = fit_preferences(model, tokenizer, supplies.pairs, training)
    return model, _facts(model, trained)


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
    return {
        "parameters": model.num_parameters(),
        "seconds": trained.seconds,
        "losses": [{"step": step, "loss": loss} for step, loss in trained.losses],
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
