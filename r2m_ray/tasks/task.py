"""Tasks: what the policy is prompted with, what it is held against, and gold where it is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Config, TaskName
from r2m_ray.errors import InputError
from r2m_ray.tasks.data import PreferencePair, load_preferences, over_limit, sift
from r2m_ray.tasks.note2answer import world as note2answer

GoldScorer = Callable[[str, str, bool], Mapping[str, float]]
"""(prompt, response, truncated) → the gold score as ``total``, and the parts it is made of."""

NOTE2ANSWER_PROMPTS = 8192
"""Training prompts of note2answer: more than any run here draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts to train on, held-out prompts and pairs.

    train_pairs: those that a prepared reward model was trained on, within the policy's limits of length; none
        where the config does not use them.
    counterfactual_pairs: by kind, pairs of responses made to differ in that alone, the better one by gold
        first; none where a task knows no gold.
    counts: what became of the rows of each file, for the run's record.
    """

    train_prompts: tuple[str, ...]
    train_pairs: tuple[PreferencePair, ...]
    eval_prompts: tuple[str, ...]
    eval_pairs: tuple[PreferencePair, ...]
    counterfactual_pairs: Mapping[str, tuple[PreferencePair, ...]]
    counts: Mapping[str, Mapping[str, int]]


def load_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task that a config names, within its limits of length; tokenizer: the policy's.

    Raises InputError for data that cannot serve, and for fewer training pairs than the warm-up takes.
    """
    match config.task.name:
        case TaskName.note2answer:
            task = _note2answer(config)
        case TaskName.preferences:
            task = _preferences(config, tokenizer)
    warm_up, there = config.reward.warmup_pairs, len(task.train_pairs)
    if warm_up > there:
        raise InputError(
            f"reward.warmup_pairs={warm_up} is more than the {there} training pairs of the task; lower it, "
            "or use more data"
        )
    return task


def gold_scorer(config: Config) -> GoldScorer | None:
    """The gold score of a config's task; None where the task has none."""
    match config.task.name:
        case TaskName.note2answer:
            from r2m_ray.tasks.note2answer.gold import gold

            return lambda prompt, response, truncated: gold(prompt, response, truncated).parts()
        case TaskName.preferences:
            return None


def _note2answer(config: Config) -> Task:
    from r2m_ray.tasks.note2answer.counterfactual import counterfactual_pairs
    from r2m_ray.tasks.note2answer.samples import gold_pairs, preference_pairs

    seed, values = config.run.seed, config.task.values_per_attribute
    pairs = config.prepare.pair_rows if config.uses_human_pairs else 0
    return Task(
        train_prompts=note2answer.prompts(seed, "train", NOTE2ANSWER_PROMPTS, values),
        train_pairs=preference_pairs(config, "train", pairs),
        eval_prompts=note2answer.prompts(seed, "eval", config.evaluate.prompts, values),
        eval_pairs=gold_pairs(config, "eval", config.evaluate.pairs),
        counterfactual_pairs=counterfactual_pairs(config, config.evaluate.pairs // 2),
        counts={},
    )


def _preferences(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    task = config.task
    if not task.train_file or not task.eval_file:
        raise InputError(
            "task.train_file and task.eval_file: task=preferences needs both; give a .jsonl or .parquet "
            "file, or a dataset as org/name:split"
        )

    def prompt_over(pair: PreferencePair) -> str | None:
        return over_limit(tokenizer, task, pair.prompt, [])

    def pair_over(pair: PreferencePair) -> str | None:
        return over_limit(tokenizer, task, pair.prompt, [pair.chosen, pair.rejected])

    found = load_preferences(task.train_file, task, split="train")
    train = sift(found, prompt_over, task.overlong)
    held_out = load_preferences(task.eval_file, task, split="test")
    prompts, pairs = sift(held_out, prompt_over, task.overlong), sift(held_out, pair_over, task.overlong)
    counts = {
        "train prompts": train.counts() | {"distinct prompts": len(train.prompts())},
        "eval prompts": prompts.counts() | {"distinct prompts": len(prompts.prompts())},
        "eval pairs": pairs.counts(),
    }
    train_pairs: tuple[PreferencePair, ...] = ()
    if config.uses_human_pairs:
        kept = sift(found, pair_over, task.overlong)
        train_pairs, counts["train pairs"] = kept.pairs, kept.counts()
    return Task(
        train_prompts=train.prompts(),
        train_pairs=train_pairs,
        eval_prompts=prompts.prompts(),
        eval_pairs=pairs.pairs,
        counterfactual_pairs={},
        counts=counts,
    )
