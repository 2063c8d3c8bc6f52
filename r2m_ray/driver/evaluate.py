"""Evaluation on fixed held-out prompts and preference pairs, by the same roles that train.

The same prompts and the same sampling seeds every time, so a curve shows the policy and not the
draw. The reward model is read at ω(T), the weight it ends the run with. ``kl_sequence`` and
``kl_token`` are of the distribution that was sampled: both policies at ``algo.temperature``, π by the
rollout engine. A training step's ``policy/kl_…`` are by the learner and at temperature 1; the two are
the same quantity where ``algo.temperature`` is 1. Averages are over what is finite.

With ``evaluate.responses_per_prompt`` above 1 the rewards are also compared within each prompt
(``r2m_ray.driver.measures``); single responses to different prompts make no such pairs. Keys of the frozen
reward model's share end in ``_frozen``; those without are the head's.
"""

from __future__ import annotations

from asyncio import gather
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Annotation, Prompt, SamplePlan, Trajectories
from r2m_ray.core.policy_loss import row_kl
from r2m_ray.core.roles import Roles
from r2m_ray.driver.measures import calibration_error, gold_measures, group_measures, pair_accuracy
from r2m_ray.driver.metrics import GOLD_TOTAL, finite_mean, grouped, mean
from r2m_ray.driver.recorder import Recorder
from r2m_ray.tasks.data import PreferencePair, packed_pairs

EVALUATION_STEP = 0
"""Stands for the training step in the seeds of evaluation samples, so they differ from every step's."""


class Evaluator:
    """Measures the current policy and reward model; the results go to the recorder."""

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
        record: Recorder,
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
        self._record = record

    async def evaluate(self, step: int) -> dict[str, float]:
        """Measure and log: gold and rewards of sampled responses, their KL, and accuracy on pairs."""
        with self._record.phase("evaluate"):
            metrics = await self._responses() if self._prompts else {}
            metrics |= await self._held_out_pairs() if self._pairs else {}
            metrics |= await self._counterfactual_pairs() if self._counterfactuals else {}
        self._record.evaluation(step, metrics)
        return metrics

    async def _responses(self) -> dict[str, float]:
        trajectories, hidden = await self._roles.rollout.sample(self._plans())
        annotation, reference = await gather(
            self._roles.reward.annotate(trajectories, hidden, omega=self._omega, step=EVALUATION_STEP),
            self._roles.reference.logprobs(trajectories),
        )
        rows = [await shard for shard in trajectories]
        notes = [await shard for shard in annotation]
        bases = [await shard for shard in reference]
        kl_N = torch.cat(
            [
                row_kl(r.rollout_logp_T, b.tempered_T, r.action_T, r.layout.offsets, "k1")
                for r, b in zip(rows, bases, strict=True)
            ]
        )
        length_N = torch.cat([r.response_lengths for r in rows])
        own_GK = grouped([n.reward_N for n in notes], notes)
        frozen_GK = grouped([n.frozen_reward_N for n in notes], notes)
        known_N = torch.isfinite(kl_N)
        metrics = {
            "reward": finite_mean(own_GK),
            "reward_nonfinite": float((~torch.isfinite(own_GK)).sum()),
            "frozen_reward": finite_mean(frozen_GK),
            "frozen_gap": finite_mean(own_GK - frozen_GK),
            "kl_sequence": finite_mean(kl_N),
            "kl_token": float(kl_N[known_N].sum() / length_N[known_N].sum()),
            "length": finite_mean(length_N),
            "truncated_fraction": finite_mean(torch.cat([r.truncated_N for r in rows])),
        }
        gold = self._record.gold(rows)
        if gold is not None:
            metrics |= {
                "gold" if part == GOLD_TOTAL else f"gold/{part}": mean(g[part] for g in gold)
                for part in gold[0]
            }
        if self._config.evaluate.responses_per_prompt > 1:
            identity_GK = torch.cat([n.response_id_N.view(-1, n.layout.group_size) for n in notes])
            metrics |= group_measures(own_GK, frozen_GK, identity_GK)
            if gold is not None:
                total_GK = torch.tensor([g[GOLD_TOTAL] for g in gold], dtype=torch.float64).view_as(own_GK)
                metrics |= gold_measures(total_GK, own_GK, frozen_GK, identity_GK)
        return metrics

    async def _held_out_pairs(self) -> dict[str, float]:
        own_M2, frozen_M2 = await self._pair_rewards(self._pairs)
        return {
            "rm_accuracy": pair_accuracy(own_M2),
            "rm_accuracy_frozen": pair_accuracy(frozen_M2),
            "calibration_error": calibration_error(own_M2),
            "calibration_error_frozen": calibration_error(frozen_M2),
        }

    async def _counterfactual_pairs(self) -> dict[str, float]:
        counts = [len(pairs) for pairs in self._counterfactuals.values()]
        rewards = await self._pair_rewards([*chain(*self._counterfactuals.values())])
        metrics = {}
        for suffix, reward_M2 in zip(("", "_frozen"), rewards, strict=True):
            for kind, part_M2 in zip(self._counterfactuals, reward_M2.split(counts), strict=True):
                metrics[f"rm_accuracy_{kind}{suffix}"] = pair_accuracy(part_M2)
        return metrics

    async def _pair_rewards(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Own and frozen rewards of pairs of texts, [M, 2]."""
        shards = [self._roles.share(shard) for shard in self._packed_pairs(pairs)]
        hidden = await self._roles.policy.hidden(shards)
        annotation = await self._roles.reward.annotate(
            shards, hidden, omega=self._omega, step=EVALUATION_STEP
        )
        notes: list[Annotation] = [await shard for shard in annotation]
        own_M2 = torch.cat([n.reward_N.view(-1, 2) for n in notes])
        return own_M2, torch.cat([n.frozen_reward_N.view(-1, 2) for n in notes])

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

    def _packed_pairs(self, pairs: Sequence[PreferencePair]) -> list[Trajectories]:
        size = self._config.algo.prompts_per_shard * self._config.algo.responses_per_prompt // 2
        return packed_pairs(self._tokenizer, pairs, pairs_per_shard=size, version=EVALUATION_STEP)
