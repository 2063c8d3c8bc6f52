"""How good prepared models are, and the demonstrator that the policy learned from."""

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
    greedy: bool = False,
) -> tuple[list[str], list[bool]]:
    """A response to each prompt at temperature 1, or the greedy one, and whether it was cut off.

    The prompts must be of one length in tokens, as those of note2answer are.
    """
    prompt_ids = torch.tensor(tokenizer([*prompts]).input_ids)
    output = policy.eval().generate(
        prompt_ids,
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        top_k=None if greedy else 0,
    )
    rows = output[:, prompt_ids.shape[1] :].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts, [tokenizer.eos_token_id not in row for row in rows]


def policy_gold(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Mean gold of a note2answer policy on held-out prompts, sampled and greedy, and its correction rate."""
    prompts = note2answer.prompts(config.run.seed, "held-out", GOLD_PROMPTS, config.task.values_per_attribute)
    found = {}
    with seeded(config.run.seed):
        for name, greedy in (("sampled", False), ("greedy", True)):
            answers = sampled(
                policy, tokenizer, prompts, max_new_tokens=config.task.max_new_tokens, greedy=greedy
            )
            found[name] = [gold(*row) for row in zip(prompts, *answers, strict=True)]
    return {
        "gold": _mean_gold(found["sampled"]),
        "gold_greedy": _mean_gold(found["greedy"]),
        "correction_rate": correction_rate(found["sampled"]),
    }


def demonstrated(demonstrations: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean gold of what the demonstrator wrote, and how often it corrected itself."""
    scores = [gold(prompt, response, False) for prompt, response in demonstrations]
    return {"gold": _mean_gold(scores), "correction_rate": correction_rate(scores)}


def correction_rate(scores: Sequence[GoldScore]) -> float:
    """Share of the wrong facts about the one asked about that are corrected to the truth; 0 without any."""
    corrected, wrong = sum(s.corrected for s in scores), sum(s.wrong for s in scores)
    return corrected / (corrected + wrong) if corrected else 0.0


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


def _mean_gold(scores: Sequence[GoldScore]) -> float:
    return sum(score.total for score in scores) / len(scores)
