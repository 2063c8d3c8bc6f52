"""Evaluation on fixed held-out prompts and preference pairs, by the same roles that train.

The same prompts and the same sampling seeds every time, so a curve shows the policy and not the
draw. The reward model is read at ω(T), the weight it ends the run with. ``kl/sequence`` and ``kl/token`` are
of the distribution that was sampled: both policies at ``algo.temperature``, π by the rollout engine. A
training step's ``policy/kl_…`` are by the learner and at temperature 1; the two are the same quantity where
``algo.temperature`` is 1.

With ``evaluate.responses_per_prompt`` above 1 the rewards are also compared within each prompt; single
responses to different prompts make no such pairs.
"""

from __future__ import annotations

from asyncio import gather
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Prompt
from r2m_ray.core.roles import Roles
from r2m_ray.driver.metrics import batch_metrics, calibration_error, kl_metrics, pair_metrics
from r2m_ray.driver.rows import Rows
from r2m_ray.driver.step import EVALUATION_STEP, sample_plans
from r2m_ray.tasks.data import PreferencePair, packed_pairs


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Measures the current policy and reward model.

    prompts, pairs: of which the first ``evaluate.prompts`` and ``evaluate.pairs`` are used. tokenizer: the
    policy's. final_omega: ω(T).
    """

    config: Config
    roles: Roles
    _: KW_ONLY
    prompts: Sequence[str]
    pairs: Sequence[PreferencePair]
    counterfactual_pairs: Mapping[str, Sequence[PreferencePair]]
    final_omega: float
    tokenizer: PreTrainedTokenizerBase

    async def measure(self) -> dict[str, float]:
        """Rewards, gold and KL of sampled responses, and accuracy on pairs, by their names."""
        prompts, pairs = (
            self.prompts[: self.config.evaluate.prompts],
            self.pairs[: self.config.evaluate.pairs],
        )
        counterfactual = {kind: found for kind, found in self.counterfactual_pairs.items() if found}
        metrics = await self._responses(prompts) if prompts else {}
        metrics |= await self._held_out_pairs(pairs) if pairs else {}
        metrics |= await self._counterfactual_pairs(counterfactual) if counterfactual else {}
        return metrics

    async def _responses(self, texts: Sequence[str]) -> dict[str, float]:
        responses = self.config.evaluate.responses_per_prompt
        prompts = [Prompt(index=i, text=text) for i, text in enumerate(texts)]
        plans = sample_plans(self.config, prompts, EVALUATION_STEP, responses=responses)
        sampled, trajectories, hidden = await self.roles.rollout.sample(plans)
        (scores, _), (kl, _) = await gather(
            self.roles.reward.annotate(trajectories, hidden, omega=self.final_omega, step=EVALUATION_STEP),
            self.roles.reference.logprobs(trajectories),
        )
        rows = Rows.of(sampled, scores, kl, group_size=responses)
        return batch_metrics(rows) | kl_metrics(rows)

    async def _held_out_pairs(self, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        own_M2, frozen_M2 = await self._pair_rewards(pairs)
        return pair_metrics(own_M2, frozen_M2) | {
            "pairs/calibration_error": calibration_error(own_M2),
            "pairs/frozen_calibration_error": calibration_error(frozen_M2),
        }

    async def _counterfactual_pairs(self, found: Mapping[str, Sequence[PreferencePair]]) -> dict[str, float]:
        counts = [len(pairs) for pairs in found.values()]
        own_M2, frozen_M2 = await self._pair_rewards([*chain(*found.values())])
        metrics: dict[str, float] = {}
        parts = zip(found, own_M2.split(counts), frozen_M2.split(counts), strict=True)
        for kind, own_part, frozen_part in parts:
            metrics |= pair_metrics(own_part, frozen_part, kind)
        return metrics

    async def _pair_rewards(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Own and frozen rewards of pairs of texts, [M, 2]."""
        size = self.config.algo.prompts_per_shard * self.config.algo.responses_per_prompt // 2
        packed = packed_pairs(self.tokenizer, pairs, pairs_per_shard=size, version=EVALUATION_STEP)
        shards = [self.roles.share(shard) for shard in packed]
        hidden = await self.roles.policy.hidden(shards)
        scores, _ = await self.roles.reward.annotate(
            shards, hidden, omega=self.final_omega, step=EVALUATION_STEP
        )
        own_M2 = torch.cat([shard.reward_N.view(-1, 2) for shard in scores])
        return own_M2, torch.cat([shard.frozen_reward_N.view(-1, 2) for shard in scores])
