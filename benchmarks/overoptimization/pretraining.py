"""What the lab adds to a preparation: a policy that is copied, and a reward model whose trunk is pretrained.

The trunk starts as the policy's, or learns to count what responses are made of, before any pair.

Axes: N conversations, C counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from benchmarks.overoptimization.additions import HELP, POLICY, Additions
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines.model_files import ModelFiles, open_model
from r2m_ray.engines.text import conversation_ids
from r2m_ray.errors import InputError, Problem, refuse
from r2m_ray.tasks.note2answer.gold import GoldScore, gold
from r2m_ray.tasks.prepare.build import Made, reward_training, save, trained_policy, trained_reward
from r2m_ray.tasks.prepare.materials import materials
from r2m_ray.tasks.prepare.measurement import mean_gold, policy_scores
from r2m_ray.tasks.prepare.trainers import (
    UNTRAINED,
    Trained,
    Training,
    every_core,
    shared_arguments,
    train,
    training_order,
)

TRUTH_COUNTS = ("correct", "wrong", "corrected")
STYLE_COUNTS = ("courtesy", "intensifiers", "off_topic", "repeats")
"""What else a response is made of; most of it shows without the note."""
ARCHITECTURE = LlamaForCausalLM.__name__


def build(config: Config, additions: Additions, directory: Path) -> dict[str, Any]:
    """Make both models below ``directory``, and return the facts about them."""
    supplies = materials(config)
    if additions.policy:
        positions = config.task.max_prompt_tokens + config.task.max_new_tokens
        model = copied_policy(Path(additions.policy), supplies.policy_tokenizer, positions=positions)
        policy = Made(model=model, facts={"parameters": model.num_parameters(), **UNTRAINED.facts()})
    else:
        policy = trained_policy(config, supplies)
    counted = UNTRAINED

    def initialise(reward: LlamaForSequenceClassification) -> None:
        nonlocal counted
        if additions.reward_from_policy:
            require_same_trunk(policy.model.config, reward.config)
            reward.base_model.load_state_dict(policy.model.base_model.state_dict(), strict=False)
        if additions.reward_auxiliary_steps == 0:
            return
        texts = [(pair.prompt, text) for pair in supplies.pairs for text in (pair.chosen, pair.rejected)]
        count_NC = [counts(*text, truth=additions.reward_auxiliary_truth) for text in texts]
        training = replace(reward_training(config), steps=additions.reward_auxiliary_steps)
        counted = learn_counts(reward, supplies.reward_tokenizer, texts, count_NC, training)

    reward = trained_reward(config, supplies, initialise)
    reward.facts["auxiliary"] = counted.facts()
    facts = save(config, supplies, policy, reward, directory)
    if config.task.name is TaskName.note2answer:
        with every_core():
            scores = policy_scores(config, policy.model, supplies.policy_tokenizer)
        shown = [gold(*demonstration, False) for demonstration in supplies.demonstrations]
        facts["policy"]["correction_rate"] = correction_rate(scores)
        facts["demonstrator"] = {"gold": mean_gold(shown), "correction_rate": correction_rate(shown)}
    return facts


def correction_rate(scores: Sequence[GoldScore]) -> float:
    """Share of the wrong facts about the one asked about that are corrected to the truth; 0 without any."""
    corrected, wrong = sum(score.corrected for score in scores), sum(score.wrong for score in scores)
    return corrected / (corrected + wrong) if corrected else 0.0


def counts(prompt: str, response: str, *, truth: bool) -> list[float]:
    """Words of a response and its ``STYLE_COUNTS``; with ``truth`` its ``TRUTH_COUNTS`` as well."""
    parts = gold(prompt, response, False).parts()
    names = (*STYLE_COUNTS, *TRUTH_COUNTS) if truth else STYLE_COUNTS
    return [float(len(response.split())), *(parts[name] for name in names)]


def learn_counts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[str, str]],
    count_NC: Sequence[Sequence[float]],
    training: Training,
) -> Trained:
    """Train the trunk of ``model`` in place to predict standardised counts; its score layer is left alone.

    A layer of C outputs in the score layer's place is trained with the trunk by the mean square error, and
    dropped.

    Args:
        model: a sequence classifier.
        tokenizer: the model's.
        conversations: prompt and response of each row.
        count_NC: the counts of each; a constant one teaches nothing.
        training: length, batch, rate and seed.
    """
    if training.steps == 0:
        return UNTRAINED
    target_NC = standardised(torch.tensor(count_NC))
    rows = [conversation_ids(tokenizer, prompt, response) for prompt, response in conversations]
    order = training_order([len(ids) for ids in rows], training)
    dataset = Dataset.from_list([{"input_ids": rows[n], "labels": target_NC[n].tolist()} for n in order])
    with TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=_counter(model, target_NC.shape[1]),
            args=TrainingArguments(**shared_arguments(training, scratch)),
            train_dataset=dataset,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        return train(trainer, "reward model's trunk")


def standardised(count_NC: Tensor) -> Tensor:
    """Each count minus its mean, divided by its standard deviation where that is not 0."""
    std_C, mean_C = torch.std_mean(count_NC, 0, correction=0)
    return (count_NC - mean_C) / torch.where(std_C > 0, std_C, 1.0)


def _counter(model: PreTrainedModel, outputs: int) -> PreTrainedModel:
    """A model of the same trunk, the very modules, with so many outputs."""
    config = deepcopy(model.config)
    config.num_labels, config.problem_type = outputs, "regression"
    counter = type(model)(config)
    setattr(counter, counter.base_model_prefix, model.base_model)
    return counter


def copied_policy(directory: Path, tokenizer: PreTrainedTokenizerBase, *, positions: int) -> PreTrainedModel:
    """The policy in ``directory``, for prompts and responses of ``positions`` tokens together.

    tokenizer: the task's, which must be the policy's own. Raises InputError with every problem of its files
    before anything is loaded.
    """
    opened = open_model(POLICY, directory)
    refuse([opened] if isinstance(opened, Problem) else [*opened.problems()], f"{POLICY}={directory}")
    assert isinstance(opened, ModelFiles)
    if opened.architecture != ARCHITECTURE:
        raise InputError(f"{POLICY}={directory}: holds {opened.architecture}, no {ARCHITECTURE}; {HELP}")
    if (opened.positions or 0) < positions:
        raise InputError(
            f"{POLICY}={directory}: reads {opened.positions} tokens, and task.max_prompt_tokens and "
            f"task.max_new_tokens are {positions} together; {HELP}, or lower one of them"
        )
    own = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if (own.get_vocab(), own.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        raise InputError(f"{POLICY}={directory}: its tokenizer is not this task's; {HELP}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    return model


def require_same_trunk(policy: LlamaConfig, reward: LlamaConfig) -> None:
    """Raise InputError where a reward model cannot start as a copy of the policy, layers above it apart."""
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        ours, theirs = getattr(reward, name), getattr(policy, name)
        if ours != theirs:
            raise InputError(
                f"lab.reward_from_policy: the reward model's {name} would be {ours}, and the policy's is "
                f"{theirs}; give prepare.reward_width and prepare.reward_heads of the policy"
            )
    if reward.num_hidden_layers < policy.num_hidden_layers:
        raise InputError(
            f"prepare.reward_layers={reward.num_hidden_layers}: the copied policy has "
            f"{policy.num_hidden_layers} layers; use as many or more"
        )
