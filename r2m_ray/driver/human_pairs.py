"""People's preference pairs with the current policy's h: what anchors the head beside its own ranking.

The groups of a step are ordered by the reward model itself, so whatever its update learns about what people
value came in through h alone. The task's own pairs are ordered by people; read together with h of the policy
as it is now, they keep the head to that order (``reward.anchor_fraction``), or fit it once before the first
step (``reward.warmup_pairs``). In a run without feedback (Ω = 1) h has width 0, and the same code refits φ.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.roles import LabelledPairs, Roles, Stats
from r2m_ray.driver.metrics import mean
from r2m_ray.run.log import RunLog
from r2m_ray.tasks.data import PreferencePair, packed_pairs

WARM_UP_STEP = 0
"""Stands for the training step where the pairs of the warm-up are annotated."""
JUDGED_SHARE = 10
"""One in so many batches of the warm-up, the first ones and the last, show how good the head was then."""


@dataclass(frozen=True, slots=True)
class HumanPairs:
    """The task's preference pairs, in an order that depends on ``run.seed`` and the training step alone.

    The warm-up takes the first ``reward.warmup_pairs`` of that order, each step the next
    ``algo.prompts_per_step``; so a run that goes on from a checkpoint needs no cursor.
    The log reports what the warm-up did.
    """

    config: Config
    roles: Roles
    _: KW_ONLY
    pairs: Sequence[PreferencePair]
    tokenizer: PreTrainedTokenizerBase
    log: RunLog

    async def annotated(self, step: int, *, omega: float) -> LabelledPairs:
        """A step's pairs under the policy and the reward model as they are; none without an anchor."""
        reward, algo = self.config.reward, self.config.algo
        if reward.anchor_fraction == 0:
            return LabelledPairs(hidden=(), annotation=())
        count, size = algo.prompts_per_step, algo.prompts_per_shard
        first = reward.warmup_pairs + (step - 1) * count
        return await self._annotate(first, count, pairs_per_shard=size, omega=omega, step=step)

    async def warm_up(self) -> None:
        """Fit the head to ``reward.warmup_pairs`` at ω = Ω, before the first step of a new run."""
        reward = self.config.reward
        if reward.warmup_pairs == 0:
            return
        with self.log.phase("warm_up"):
            stats = [
                await self.roles.reward.warm_up(batch, omega=reward.omega_floor)
                async for batch in self._warm_up_batches()
            ]
        self.log.message(warm_up_summary(reward.warmup_pairs, stats))

    async def _warm_up_batches(self) -> AsyncIterator[LabelledPairs]:
        """Batches of one optimizer step each, annotated as many rows at a time as a training step has.

        A shard has as many rows as a step's, or fewer, so that a batch is complete shards.
        """
        algo, pairs = self.config.algo, self.config.reward.warmup_pairs
        groups_as_pairs = algo.responses_per_prompt // 2
        enlarged = math.gcd(algo.prompts_per_step // algo.prompts_per_shard, groups_as_pairs)
        pairs_per_shard = algo.prompts_per_shard * enlarged
        shards_per_batch = algo.prompts_per_step // pairs_per_shard
        at_once = algo.prompts_per_step * groups_as_pairs
        for first in range(0, pairs, at_once):
            found = await self._annotate(
                first,
                min(at_once, pairs - first),
                pairs_per_shard=pairs_per_shard,
                omega=self.config.reward.omega_floor,
                step=WARM_UP_STEP,
            )
            for i in range(0, len(found.hidden), shards_per_batch):
                part = slice(i, i + shards_per_batch)
                yield LabelledPairs(hidden=found.hidden[part], annotation=found.annotation[part])

    async def _annotate(
        self, first: int, count: int, *, pairs_per_shard: int, omega: float, step: int
    ) -> LabelledPairs:
        chosen = [self.pairs[i] for i in drawn(len(self.pairs), first, count, seed=self.config.run.seed)]
        packed = packed_pairs(self.tokenizer, chosen, pairs_per_shard=pairs_per_shard, version=step)
        shards = [self.roles.share(shard) for shard in packed]
        hidden = await self.roles.policy.hidden(shards)
        _, annotation = await self.roles.reward.annotate(shards, hidden, omega=omega, step=step)
        return LabelledPairs(hidden=hidden, annotation=annotation)


def drawn(size: int, first: int, count: int, *, seed: int) -> list[int]:
    """Places ``first`` to ``first + count − 1`` of an endless order of ``size`` things.

    Each pass holds all of them once, in an order of its own that ``seed`` decides.
    """
    return [_shuffled(size, seed, place // size)[place % size] for place in range(first, first + count)]


def warm_up_summary(pairs: int, stats: Sequence[Stats]) -> str:
    """How well the head ordered a warm-up's pairs at its beginning and at its end, by the batches' numbers.

    Each batch was judged before it was learned from, and none came twice.
    """
    share = max(1, len(stats) // JUDGED_SHARE)
    found = "; ".join(
        f"accuracy {mean(batch['human_accuracy'] for batch in part):.3f}, Bradley–Terry "
        f"{mean(batch['bradley_terry_human'] for batch in part):.3f} in its {name} {share}"
        for name, part in (("first", stats[:share]), ("last", stats[-share:]))
    )
    skipped = sum(batch["nonfinite_steps"] for batch in stats)
    doubt = f"; {skipped:g} were not finite, and were skipped" if skipped else ""
    return f"warm-up on {pairs} preference pairs, {len(stats)} batches: {found}{doubt}"


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, turn: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed} human pairs {turn}").shuffle(order)
    return tuple(order)
