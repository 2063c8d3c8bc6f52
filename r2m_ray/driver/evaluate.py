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
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.core.roles import Roles
from r2m_ray.driver.metrics import batch_metrics, calibration_error, kl_metrics, pair_metrics
from r2m_ray.driver.rows import Rows
from r2m_ray.tasks.data import PreferencePair, packed_pairs

EVALUATION_STEP = 0
"""Stands for the training step in the seeds of evaluation samples, so they differ from every step's."""


class Evaluator:
    """Measures the current policy and reward model.

    tokenizer: the policy's. final_omega: ω(T).
    """

    def __init__(
        self,
        config: Config,
        roles: Roles,
        *,
        prompts: Sequence[str],
        pairs: Sequence[PreferencePair],
        counterfactual_pairs: Mapping[str, Sequence[PreferencePair]],
        final_omega: float,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._config = config
        self._roles = roles
        self._prompts = [
            Prompt(index=i, text=text) for i, text in enumerate(prompts[: config.evaluate.prompts])
        ]
        self._pairs = pairs[: config.evaluate.pairs]
        self._counterfactuals = {kind: found for kind, found in counterfactual_pairs.items() if found}
        self._omega = final_omega
        self._tokenizer = tokenizer

    async def measure(self) -> dict[str, float]:
        """Rewards, gold and KL of sampled responses, and accuracy on pairs, by their names."""
        metrics = await self._responses() if self._prompts else {}
        metrics |= await self._held_out_pairs() if self._pairs else {}
        metrics |= await self._counterfactual_pairs() if self._counterfactuals else {}
        return metrics

    async def _responses(self) -> dict[str, float]:
        sampled, trajectories, hidden = await self._roles.rollout.sample(self._plans())
        (scores, _), (kl, _) = await gather(
            self._roles.reward.annotate(trajectories, hidden, omega=self._omega, step=EVALUATION_STEP),
            self._roles.reference.logprobs(trajectories),
        )
        rows = Rows.of(sampled, scores, kl, group_size=self._config.evaluate.responses_per_prompt)
        return batch_metrics(rows) | kl_metrics(rows)

    async def _held_out_pairs(self) -> dict[str, float]:
        own_M2, frozen_M2 = await self._pair_rewards(self._pairs)
        return pair_metrics(own_M2, frozen_M2) | {
            "pairs/calibration_error": calibration_error(own_M2),
            "pairs/frozen_calibration_error": calibration_error(frozen_M2),
        }

    async def _counterfactual_pairs(self) -> dict[str, float]:
        counts = [len(pairs) for pairs in self._counterfactuals.values()]
        own_M2, frozen_M2 = await self._pair_rewards([*chain(*self._counterfactuals.values())])
        metrics: dict[str, float] = {}
        parts = zip(self._counterfactuals, own_M2.split(counts), frozen_M2.split(counts), strict=True)
        for kind, own_part, frozen_part in parts:
            metrics |= pair_metrics(own_part, frozen_part, kind)
        return metrics

    async def _pair_rewards(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Own and frozen rewards of pairs of texts, [M, 2]."""
        size = self._config.algo.prompts_per_shard * self._config.algo.responses_per_prompt // 2
        packed = packed_pairs(self._tokenizer, pairs, pairs_per_shard=size, version=EVALUATION_STEP)
        shards = [self._roles.share(shard) for shard in packed]
        hidden = await self._roles.policy.hidden(shards)
        scores, _ = await self._roles.reward.annotate(shards, hidden, omega=self._omega, step=EVALUATION_STEP)
        own_M2 = torch.cat([shard.reward_N.view(-1, 2) for shard in scores])
        return own_M2, torch.cat([shard.frozen_reward_N.view(-1, 2) for shard in scores])

    def _plans(self) -> list[SamplePlan]:
        rows = self._config.algo.prompts_per_shard * self._config.algo.responses_per_prompt
        group_size = self._config.evaluate.responses_per_prompt
        size = max(1, rows // group_size)
        return [
            SamplePlan(
                prompts=tuple(self._prompts[i : i + size]),
                group_size=group_size,
                step=EVALUATION_STEP,
                seed=self._config.run.seed,
                temperature=self._config.algo.temperature,
                max_new_tokens=self._config.task.max_new_tokens,
            )
            for i in range(0, len(self._prompts), size)
        ]
