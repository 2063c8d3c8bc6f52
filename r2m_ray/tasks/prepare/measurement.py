"""How good prepared models are: gold of the policy, and accuracy of the reward model on held-out pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.engines.reward.trunk import RewardTrunk
from r2m_ray.tasks.data import PreferencePair
from r2m_ray.tasks.note2answer import world as note2answer
from r2m_ray.tasks.note2answer.gold import GoldScore, gold

GOLD_PROMPTS = 1024
"""note2answer: held-out prompts on which a prepared policy is measured: mean gold to about .05."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a while: initial weights and sampling draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def sampled(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
) -> tuple[list[str], list[bool]]:
    """A response to each prompt at temperature 1, and whether it was cut off before its end token.

    The prompts must be of one length in tokens, as those of note2answer are. Draws from torch's global
    generator.
    """
    prompt_ids = torch.tensor(tokenizer([*prompts]).input_ids)
    output = policy.eval().generate(prompt_ids, max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    rows = output[:, prompt_ids.shape[1] :].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts, [tokenizer.eos_token_id not in row for row in rows]


def policy_scores(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[GoldScore]:
    """Gold of a note2answer policy's responses to held-out prompts, sampled from ``run.seed``."""
    prompts = note2answer.prompts(config.run.seed, "held-out", GOLD_PROMPTS, config.task.values_per_attribute)
    with seeded(config.run.seed):
        answers = sampled(policy, tokenizer, prompts, max_new_tokens=config.task.max_new_tokens)
    return [gold(*row) for row in zip(prompts, *answers, strict=True)]


def mean_gold(scores: Sequence[GoldScore]) -> float:
    """The mean of the total scores."""
    return sum(score.total for score in scores) / len(scores)


def prepared_trunk(config: Config, directory: Path) -> RewardTrunk:
    """The trunk of a prepared reward model, in float32 on the processor."""
    return RewardTrunk(
        model_dir=str(directory),
        dtype=torch.float32,
        attention=config.model.attention,
        score_layer="score",
        max_length=config.reward.max_length,
        tokens_per_microbatch=config.reward.tokens_per_microbatch,
        device=torch.device("cpu"),
    )


def reward_accuracy(config: Config, directory: Path, pairs: Sequence[PreferencePair]) -> float:
    """Share of pairs whose chosen response a saved reward model scores higher, read as annotation will."""
    trunk = prepared_trunk(config, directory)
    prompts = [pair.prompt for pair in pairs]
    _, chosen_N = trunk.read(prompts, [pair.chosen for pair in pairs])
    _, rejected_N = trunk.read(prompts, [pair.rejected for pair in pairs])
    return float((chosen_N > rejected_N).double().mean())
