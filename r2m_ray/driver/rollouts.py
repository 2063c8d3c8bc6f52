"""The rows of a step that ``rollouts.jsonl`` keeps: their texts, and what the head attended to.

Texts come from the engine that sampled them, attention from the reward model; the driver has neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Annotation, Hidden, RowText, Trajectories
from r2m_ray.core.reward_loss import group_pairs
from r2m_ray.core.roles import Roles, Shards
from r2m_ray.driver.rows import Rows
from r2m_ray.run.vocabulary import TOTAL


@dataclass(frozen=True, slots=True)
class Example:
    """One row worth reading: its texts, and the head's weight on each input token; None without feedback."""

    text: RowText
    attention: tuple[float, ...] | None

    @property
    def nbytes(self) -> int:
        """Bytes of its texts and weights."""
        words = (self.text.prompt, self.text.response, *self.text.tokens)
        return sum(len(word.encode()) for word in words) + 8 * len(self.attention or ())


async def read_examples(
    config: Config,
    roles: Roles,
    trajectories: Shards[Trajectories],
    hidden: Shards[Hidden],
    annotation: Shards[Annotation],
) -> list[Example]:
    """The first ``logging.rollouts_per_step`` rows of a step, with the attention behind their rewards.

    That is the attention of the head before its update, on the h of the annotation.
    """
    examples: list[Example] = []
    for rows, states, notes in zip(trajectories, hidden, annotation, strict=True):
        missing = config.logging.rollouts_per_step - len(examples)
        if missing <= 0:
            break
        texts = await roles.rollout.texts(rows, missing)
        if config.uses_feedback:
            weights = await roles.reward.attention(states, notes, missing)
            examples += [Example(text, tuple(row)) for text, row in zip(texts, weights, strict=True)]
        else:
            examples += [Example(text, None) for text in texts]
    return examples


def rollout_records(
    step: int, omega: float, rows: Rows, advantage: Sequence[Tensor], examples: Sequence[Example]
) -> Iterator[dict[str, Any]]:
    """The rows of ``examples``, ready for JSON.

    ``group`` and ``row`` count through the step. ``role`` is ``winner`` or ``loser`` of the group's
    Bradley–Terry pair by the annotation rewards, else ``none``. ``attention`` pairs each input token's text
    with the weight that the head gives it.
    """
    roles = _pair_roles(rows)
    advantages = [value for shard in advantage for value in shard.tolist()]
    for n, example in enumerate(examples):
        gold = {part: float(value_N[n]) for part, value_N in rows.gold.items()}
        attention = example.attention
        yield {
            "step": step,
            "group": n // rows.group_size,
            "row": n,
            "prompt": example.text.prompt,
            "response": example.text.response,
            "role": roles[n],
            "reward": float(rows.reward_N[n]),
            "frozen_reward": float(rows.frozen_reward_N[n]),
            "omega": omega,
            "advantage": advantages[n],
            "truncated": bool(rows.truncated_N[n]),
            "tokens": int(rows.length_N[n]),
            "gold": gold.get(TOTAL),
            "gold_parts": {part: value for part, value in gold.items() if part != TOTAL} if gold else None,
            "attention": None
            if attention is None
            else [list(pair) for pair in zip(example.text.tokens, attention, strict=True)],
        }


def _pair_roles(rows: Rows) -> list[str]:
    size = rows.group_size
    reward_GK = rows.reward_N.view(-1, size)
    winner_G, loser_G, pair_G = group_pairs(reward_GK, rows.response_id_N.view(-1, size))
    roles = ["none"] * len(rows.reward_N)
    for group in (pair_G & reward_GK.isfinite().all(1)).nonzero()[:, 0].tolist():
        roles[group * size + int(winner_G[group])] = "winner"
        roles[group * size + int(loser_G[group])] = "loser"
    return roles
