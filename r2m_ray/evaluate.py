"""Evaluation on fixed held-out prompts and preference pairs, by the same roles that train.

The same prompts and the same sampling seeds every time, so a curve shows the policy and not the
draw. The reward model is read at ω(T), the weight it ends the run with. ``kl_sequence`` and
``kl_token`` are of the distribution that was sampled: both policies at ``algo.temperature``, π by the
rollout engine. A training step's ``policy/kl_…`` are by the learner and at temperature 1; the two are
the same quantity where ``algo.temperature`` is 1. Averages are over what is finite.
"""

from __future__ import annotations

from asyncio import gather
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from r2m_ray.batch import Annotation, Trajectories, pack_rows
from r2m_ray.config import Config
from r2m_ray.core.kl import row_kl
from r2m_ray.data import PreferencePair
from r2m_ray.metrics import finite_mean, mean
from r2m_ray.models.text import policy_prompt_ids, policy_response_ids
from r2m_ray.recorder import Recorder
from r2m_ray.roles import Prompt, Roles, SamplePlan

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
        self._omega = final_omega
        self._tokenizer = tokenizer
        self._record = record

    async def evaluate(self, step: int) -> dict[str, float]:
        """Measure and log: gold and rewards of sampled responses, their KL, and pair accuracy."""
        with self._record.phase("evaluate"):
            metrics = await self._responses() if self._prompts else {}
            metrics |= await self._pair_accuracy() if self._pairs else {}
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
        reward_N = torch.cat([n.reward_N for n in notes])
        known_N = torch.isfinite(kl_N)
        metrics = {
            "reward": finite_mean(reward_N),
            "reward_nonfinite": float((~torch.isfinite(reward_N)).sum()),
            "frozen_reward": finite_mean(torch.cat([n.frozen_reward_N for n in notes])),
            "kl_sequence": finite_mean(kl_N),
            "kl_token": float(kl_N[known_N].sum() / length_N[known_N].sum()),
            "length": finite_mean(length_N),
            "truncated_fraction": finite_mean(torch.cat([r.truncated_N for r in rows])),
        }
        gold = self._record.gold(rows)
        if gold is not None:
            metrics |= {
                "gold" if part == "total" else f"gold/{part}": mean(g[part] for g in gold) for part in gold[0]
            }
        return metrics

    async def _pair_accuracy(self) -> dict[str, float]:
        shards = [self._roles.share(shard) for shard in self._packed_pairs()]
        hidden = await self._roles.policy.hidden(shards)
        annotation = await self._roles.reward.annotate(
            shards, hidden, omega=self._omega, step=EVALUATION_STEP
        )
        notes: list[Annotation] = [await shard for shard in annotation]
        own = torch.cat([n.reward_N.view(-1, 2) for n in notes])
        frozen = torch.cat([n.frozen_reward_N.view(-1, 2) for n in notes])
        return {
            "rm_accuracy": float((own[:, 0] > own[:, 1]).double().mean()),
            "rm_accuracy_frozen": float((frozen[:, 0] > frozen[:, 1]).double().mean()),
        }

    def _plans(self) -> list[SamplePlan]:
        size = self._config.algo.prompts_per_shard * self._config.algo.responses_per_prompt
        return [
            SamplePlan(
                prompts=tuple(self._prompts[i : i + size]),
                group_size=1,
                step=EVALUATION_STEP,
                seed=self._config.run.seed,
                temperature=self._config.algo.temperature,
                max_new_tokens=self._config.task.max_new_tokens,
            )
            for i in range(0, len(self._prompts), size)
        ]

    def _packed_pairs(self) -> list[Trajectories]:
        """Held-out pairs as groups of two rows, chosen first, tokenized as the policy writes."""
        size = self._config.algo.prompts_per_shard * self._config.algo.responses_per_prompt // 2
        tokenizer = self._tokenizer
        return [
            pack_rows(
                [pair.prompt for pair in shard],
                [policy_prompt_ids(tokenizer, pair.prompt) for pair in shard],
                [
                    policy_response_ids(tokenizer, text)
                    for pair in shard
                    for text in (pair.chosen, pair.rejected)
                ],
                [text for pair in shard for text in (pair.chosen, pair.rejected)],
                version=EVALUATION_STEP,
            )
            for shard in (self._pairs[i : i + size] for i in range(0, len(self._pairs), size))
        ]
