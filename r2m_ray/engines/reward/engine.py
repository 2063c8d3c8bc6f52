"""The reward engine: a frozen reward model whose head is R2M's, trained online.

Axes: N rows, T packed tokens, P policy width, D reward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

from r2m_ray.config.schema import Config
from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch, Scores, Trajectories
from r2m_ray.core.head import R2MHead
from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.reward.head_files import HeadInfo, load_head, save_head
from r2m_ray.engines.reward.trainer import HeadTrainer, RewardShard, content_seed
from r2m_ray.engines.reward.trunk import RewardTrunk
from r2m_ray.engines.weights import module_digest, tensor_digest
from r2m_ray.errors import InputError, RunError

HEAD_DIRECTORY = "reward_head"


@raises_device_loss("reward engine")
class RewardEngine:
    """One replica of the reward model: annotates shards, and updates the head together with its peers.

    Args:
        config: of the run.
        model_dir: directory of the reward model.
        policy_width: P, the width of h; a run without feedback (Ω = 1) takes h of width 0 whatever it is.
        rank, world_size: this replica among its peers. With several, they meet at MASTER_ADDR and MASTER_PORT
            of the environment, and start alike because every draw is seeded by ``run.seed``.
        device: where it computes.
        gold: the gold score of a (prompt, response, truncated) as ``total`` and parts, if the task has one.

    Raises:
        InputError: where the reward model or its score layer does not fit.
        DeviceLost: by every method, where a device or another replica failed.
    """

    def __init__(
        self,
        *,
        config: Config,
        model_dir: str,
        policy_width: int,
        rank: int,
        world_size: int,
        device: torch.device,
        gold: Callable[[str, str, bool], Mapping[str, float]] | None = None,
    ) -> None:
        self._config = config
        self._gold = gold
        self._device = device
        self.trunk = RewardTrunk(
            model_dir=model_dir,
            dtype=getattr(torch, config.model.reward_dtype),
            attention=config.model.attention,
            score_layer=config.model.score_layer,
            max_length=config.reward.max_length,
            tokens_per_microbatch=config.reward.tokens_per_microbatch,
            device=device,
        )
        self.head = R2MHead(
            policy_width if config.uses_feedback else 0,
            self.trunk.width,
            config.reward.attention_width,
            self.trunk.score_weight_D,
            self.trunk.score_bias,
            wo_init=config.reward.wo_init,
            init_std=config.reward.init_std,
            generator=torch.Generator().manual_seed(config.run.seed),
        ).to(device)
        self._info = HeadInfo(
            policy_width=self.head.w_k.shape[0],
            reward_width=self.trunk.width,
            attention_width=config.reward.attention_width,
            score_bias=self.trunk.score_bias is not None,
            omega=1.0,
            reward_model=model_dir,
        )
        if world_size > 1:
            # Shorter than the phase that waits for it, so that the error names the collective.
            timeout = timedelta(seconds=0.9 * config.cluster.phase_timeout_s)
            backend = "gloo" if device.type == "cpu" else "nccl"
            distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        self._world_size = world_size
        self._trainer = HeadTrainer(self.head, config.reward, world_size=world_size)
        self._warm_up: HeadTrainer | None = None

    @torch.no_grad()
    def annotate(
        self, trajectories: Trajectories, hidden: Hidden, omega: float, step: int
    ) -> tuple[Scores, Annotation]:
        """Reward r = φ((1−ω) Ĥ + ω H_last) of every row of a shard (Eqs. 3–4), and the frozen model's own.

        Returns the numbers per row, and the record that the update needs. At ω = 1 with an untrained head
        both rewards are equal to the last bit. `step` seeds ``feedback.noise``.
        Rewards that are not finite are passed on, to be counted by the caller.
        Raises InputError for a conversation too long to read, RunError where h is not that of these rows.
        """
        layout = trajectories.layout
        rte_ND, frozen_reward_N = self.trunk.read(trajectories.row_prompts, trajectories.responses)
        feedback_TP = self._noised(hidden, layout, rte_ND, f"{step} annotate")
        reward_N = self.head(rte_ND, feedback_TP, layout.offsets.to(self._device), omega)
        scores = Scores(
            reward_N=reward_N.cpu(),
            frozen_reward_N=frozen_reward_N.cpu(),
            response_id_N=_response_ids(trajectories),
            gold=self._gold_scores(trajectories),
        )
        unknown_N = torch.full((layout.rows,), math.nan)
        return scores, Annotation(
            layout=layout,
            reward_N=scores.reward_N,
            frozen_reward_N=scores.frozen_reward_N,
            gold_N=scores.gold["total"].float() if scores.gold else unknown_N,
            rte_ND=rte_ND.cpu(),
            response_id_N=scores.response_id_N,
        )

    def warm_up(self, human: Sequence[RewardBatch], omega: float) -> dict[str, float]:
        """Take one optimizer step by Bradley–Terry alone on pairs in people's order, before the first update.

        At ``reward.warmup_learning_rate``, with moments of its own: the first update starts without any.
        Shards and statistics are as in `update`.
        """
        if self._warm_up is None:
            alone = replace(
                self._config.reward,
                anchor_fraction=1.0,
                entropy_weight=0.0,
                learning_rate=self._config.reward.warmup_learning_rate,
            )
            self._warm_up = HeadTrainer(self.head, alone, world_size=self._world_size)
        return self._warm_up.step((), omega, (self._shard(pairs, 0, 0) for pairs in human))

    def update(
        self, batches: Sequence[RewardBatch], omega: float, step: int, human: Sequence[RewardBatch] = ()
    ) -> dict[str, float]:
        """Fit cross-attention and φ to annotated groups by GREBT (Eqs. 5–7), ``reward.update_steps`` times.

        `batches` are this replica's shards; every replica must call, even with none, and the result is that
        of one replica with all shards, to rounding. The trunk does not run: H_last is the annotation's.
        `human` are shards of pairs, the row that people preferred first, which take the share
        ``reward.anchor_fraction`` of Bradley–Terry; without one they are not read.

        Returns statistics, equal on all replicas, by the names that the registry of metrics explains as
        ``rm/…``: from before the first optimizer step, but skipped_steps and nonfinite_steps of all of them.
        Those of human pairs only where they were read; means over nothing are NaN. Without update steps a
        head that reads h is only measured, and one that does not has no statistics.
        """
        self._info = replace(self._info, omega=omega)
        self._warm_up = None
        stats: list[dict[str, float]] = []
        for i in range(self._config.reward.update_steps):
            shards = (self._shard(batch, step, i) for batch in batches)
            pairs = (self._shard(batch, step, i) for batch in human)
            stats.append(self._trainer.step(shards, omega, pairs))
        if stats:
            counts = ("skipped_steps", "nonfinite_steps")
            return stats[0] | {name: sum(s[name] for s in stats) for name in counts}
        if not self._config.uses_feedback:
            return {}
        return self._trainer.measure((self._shard(batch, step, 0) for batch in batches), omega)

    def attention(self, hidden: Hidden, annotation: Annotation) -> Tensor:
        """The head's attention weight on every token, float32 [T], 1 in sum over each row; h as exported."""
        rte_ND = annotation.rte_ND.to(self._device)
        hidden_TP = self._feedback(hidden, annotation.layout)
        offsets = annotation.layout.offsets.to(self._device)
        return self.head.diagnostics(rte_ND, hidden_TP, offsets).weight_T.cpu()

    def trunk_digest(self) -> str:
        """sha256 of the frozen reward model's weights."""
        return module_digest(self.trunk.model)

    def save(self, directory: Path) -> None:
        """Write head and optimizer below ``directory/reward_head``; any one replica's files serve all."""
        save_head(self.head, self._info, directory / HEAD_DIRECTORY)
        self._trainer.save(directory / HEAD_DIRECTORY)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, so that updates go on as if uninterrupted.

        Raises InputError where a file is absent, damaged, or of a head of another size.
        """
        head, info = load_head(directory / HEAD_DIRECTORY)
        expected = replace(self._info, omega=info.omega, reward_model=info.reward_model)
        if info != expected:
            raise InputError(
                f"{directory / HEAD_DIRECTORY} holds {info}, and this run needs {expected}; resume with the "
                "models and reward.attention_width of the saved run"
            )
        self._trainer.load(directory / HEAD_DIRECTORY)
        self.head.load_state_dict(head.state_dict())
        self._info = replace(self._info, omega=info.omega)

    def digests(self) -> dict[str, str]:
        """sha256 of each parameter of the head; equal on replicas that are equal to the last bit."""
        return {name: tensor_digest(parameter) for name, parameter in self.head.named_parameters()}

    def _shard(self, batch: RewardBatch, step: int, index: int) -> RewardShard:
        notes, seed = batch.annotation, self._config.run.seed
        feedback_TP = self._noised(batch.hidden, notes.layout, notes.rte_ND, f"{step} update {index}")
        return RewardShard(hidden_TP=feedback_TP, annotation=notes, moment=f"{seed} {step} pairs")

    def _gold_scores(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """float64 [N] by part of the gold score, none where the task knows no gold."""
        if self._gold is None:
            return {}
        rows = (trajectories.row_prompts, trajectories.responses, trajectories.truncated_N.tolist())
        found = [self._gold(*row) for row in zip(*rows, strict=True)]
        return {
            part: torch.tensor([score[part] for score in found], dtype=torch.float64) for part in found[0]
        }

    def _noised(self, hidden: Hidden, layout: Layout, rte_ND: Tensor, moment: str) -> Tensor:
        """`_feedback`, noised afresh at each moment as ``feedback.noise`` says."""
        hidden_TP, noise = self._feedback(hidden, layout), self._config.feedback.noise
        if noise == 0:
            return hidden_TP
        seed = content_seed(f"{self._config.run.seed} {moment}", rte_ND)
        return gaussian_feedback(hidden_TP, noise, seed)

    def _feedback(self, hidden: Hidden, layout: Layout) -> Tensor:
        """h [T, P] on the head's device."""
        expected = (layout.tokens, self._info.policy_width)
        if not torch.equal(hidden.layout.offsets, layout.offsets) or hidden.hidden_TP.shape != expected:
            raise RunError(
                f"reward: h is {list(hidden.hidden_TP.shape)} in {hidden.layout.rows} rows, but the shard "
                f"needs {list(expected)} in {layout.rows}; it was exported for other rows or another policy"
            )
        return hidden.hidden_TP.to(self._device)


def gaussian_feedback(hidden_TP: Tensor, noise: float, seed: int) -> Tensor:
    """h with a fraction of noise, `(1−noise)·h + noise·(μ + σ·ε)`, ε ~ N(0, 1), float32 [T, P].

    μ and σ (ddof 0) are those of each feature over the T tokens at hand, which are one shard's: a replica may
    hold no other. So another ``algo.prompts_per_shard`` draws from slightly different moments.
    """
    states_TP = hidden_TP.float()
    std_P, mean_P = torch.std_mean(states_TP, 0, correction=0)
    generator = torch.Generator(states_TP.device).manual_seed(seed)
    noise_TP = torch.randn(states_TP.shape, generator=generator, device=states_TP.device)
    return torch.lerp(states_TP, mean_P + std_P * noise_TP, noise)


def _response_ids(trajectories: Trajectories) -> Tensor:
    """int64 [N], for each row the first row of the shard with the same response tokens."""
    tokens = trajectories.label_T[trajectories.action_T]
    responses = [tuple(r.tolist()) for r in torch.split(tokens, trajectories.response_lengths.tolist())]
    first: dict[tuple[int, ...], int] = {}
    return torch.tensor([first.setdefault(ids, n) for n, ids in enumerate(responses)], dtype=torch.int64)
