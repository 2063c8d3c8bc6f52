"""The trainable policy on DeepSpeed: one object per data-parallel rank, with no knowledge of who drives it.

Axes: T packed tokens, A response tokens of one block, P policy width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from r2m_ray.config.schema import Config, FeedbackRefresh, OldLogprobs
from r2m_ray.core.batch import Hidden, PolicyBatch, Trajectories
from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.policy.blocks import Block, Rows, idle_block
from r2m_ray.engines.policy.causal import CausalScorer, load_causal
from r2m_ray.engines.policy.minibatch import MiniBatch, minibatches, split_hidden
from r2m_ray.engines.policy.objective import LossSums, Objective
from r2m_ray.engines.policy.state import load_state, save_state
from r2m_ray.engines.policy.stats import UpdateStats
from r2m_ray.engines.policy.zero import ZeroEngine, join_group, largest, total
from r2m_ray.engines.weights import WeightBucket, pack_buckets, require_finite, tensor_digest

POLICY_DIR = "policy"
STATE_DIR = "policy_state"


@raises_device_loss("policy learner")
class PolicyLearner:
    """π_θ and its optimizer on one rank; every method is called on all ranks, with the same arguments except
    the shards. A rank's shards are its own, and may be none.

    Args:
        config: of the run.
        model_dir: Hugging Face directory of the policy.
        rank, world_size: this process among the data parallel ranks, which meet at MASTER_ADDR and
            MASTER_PORT of the environment.
        device: where this rank computes.

    Raises:
        InputError: for a model or a DeepSpeed key that cannot be trained with.
        DeviceLost: by every method, where a device or another rank failed.
    """

    def __init__(
        self, *, config: Config, model_dir: str, rank: int, world_size: int, device: torch.device
    ) -> None:
        # Shorter than the phase that waits for it, so that the error names the collective.
        timeout_s = 0.9 * config.cluster.phase_timeout_s
        join_group(rank=rank, world_size=world_size, device=device, timeout_s=timeout_s)
        torch.manual_seed(config.run.seed)
        self._config = config
        self._device = device
        self._objective = Objective.of(config)
        self._model = load_causal(
            model_dir,
            field="model.policy",
            dtype=getattr(torch, config.model.dtype.value),
            attention=config.model.attention,
            device=device,
        )
        self._model.train()
        if config.policy.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self._scorer = CausalScorer(
            self._model,
            attention=config.model.attention,
            temperature=config.algo.temperature,
            token_budget=config.policy.tokens_per_microbatch,
        )
        self._engine = ZeroEngine(self._scorer, self._model, config=config)
        _, logp_A, _ = self._score(idle_block(device))
        self._engine.create_state(logp_A.sum())

    def update(
        self, batches: Sequence[PolicyBatch], shard_ids: Sequence[int]
    ) -> tuple[dict[str, float], list[Hidden]]:
        """k epochs of the clipped objective (Eq. 2) over the step's mini-batches.

        Args:
            batches: this rank's shards.
            shard_ids: their numbers in the step, which decide the mini-batch.

        Returns:
            Statistics, equal on all ranks, and the refreshed h of each batch, in its order: none with
            ``feedback.refresh=none``, of width 0 in a run without feedback.

        π_old is the learner before its first step, scored without gradients; rows of the first mini-batch
        are scored by their own training pass, which sees the same weights. With ``algo.old_logp=rollout``
        there is no extra pass at all: π_old is what the learner says when it first meets a row, in epoch 1,
        and the ratio to the engine that sampled becomes the truncated weight `min(π_old/π_rollout, cap)`. So
        the clip always compares the learner with itself, and the engines' arithmetic only enters a bounded
        factor.
        A step with a non-finite loss or gradient is skipped on all ranks alike, and counted.
        """
        algo = self._config.algo
        steps = minibatches(batches, shard_ids, config=self._config, scorer=self._scorer)
        rows, passes = self._agree(steps)
        if algo.old_logp is OldLogprobs.learner:
            for step, count in zip(steps[1:], passes[1:], strict=True):
                self._score_old(step, count)
        stats = UpdateStats(self._device)
        # Of each mini-batch, written by its last pass.
        tokens = [step.tokens for step in steps] if self._refreshes_in_passing else []
        fresh_TP = self._states_buffer(sum(tokens))
        fresh = fresh_TP.split(tokens) if tokens else ()
        for epoch in range(algo.epochs):
            for m, step in enumerate(steps):
                unscored = epoch == 0 and (m == 0 or algo.old_logp is OldLogprobs.rollout)
                sums, ratio_max = self._accumulate(
                    step,
                    rows=rows[m],
                    passes=passes[m],
                    unscored=unscored,
                    hidden_TP=fresh[m] if fresh and epoch == algo.epochs - 1 else None,
                )
                learning_rate = self._engine.learning_rate
                applied = self._engine.step()
                stats.count(applied, sums, ratio_max, self._engine.grad_norm, learning_rate)
        found = stats.result(
            steps,
            unmoved=len(steps) if algo.old_logp is OldLogprobs.learner else 1,
            passes=algo.epochs * sum(passes),
        )
        return found, self._refreshed(batches, steps, fresh_TP)

    def hidden(self, trajectories: Sequence[Trajectories]) -> list[Hidden]:
        """h of every row under the current weights; of width 0 in a run without feedback."""
        rows = Rows.of(trajectories)
        hidden_TP = self._states_buffer(rows.input_T.numel())
        if self._config.uses_feedback:
            laid = self._scorer.blocks(rows)
            passes = int(largest(torch.tensor(len(laid), device=self._device)))
            nothing = torch.zeros(0, dtype=torch.int64, device=self._device)
            with self._engine.reading():
                for block in self._joined(laid, passes):
                    states_SP, *_ = self._engine.forward(block.input_BL, block.position_BL, nothing, nothing)
                    hidden_TP[block.token_T] = states_SP[block.slot_T]
        return split_hidden(trajectories, hidden_TP)

    def weight_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what `weights` yields, without gathering anything."""
        dtype = self._model.dtype
        return [(name, dtype, tuple(shape)) for name, shape in self._engine.shapes.items()]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, tied ones once, full tensors on the learner's device.

        All ranks must iterate side by side: with ZeRO-3 they gather each parameter together. The tensors
        may not be written to, and hold until the next update. Raises RunError naming the first that is not
        finite: such weights are neither saved nor sent.
        """
        for name, parameter in self._engine.parameters.items():
            with self._engine.gathered(parameter):
                # ZeRO-3 takes the gathered values away again.
                weight = parameter.detach().clone() if self._engine.stage == 3 else parameter.detach()
            require_finite(f"policy weight {name}", weight)
            yield name, weight

    def weight_buckets(self, bucket_bytes: int, *, pack: bool = True) -> Iterator[WeightBucket | None]:
        """`weights` in buckets on the CPU, the same ones on every rank; None for each one without ``pack``.

        All ranks must ask for each bucket: with ZeRO-3 it is gathered by all of them.
        """
        # A generator of its own, so that what fails while it packs is seen here as well.
        yield from pack_buckets(self.weights(), bucket_bytes, pack=pack)

    def weight_digests(self) -> dict[str, str]:
        """sha256 of each weight, alike on ranks that are equal to the last bit; all ranks must call it."""
        return {name: tensor_digest(weight) for name, weight in self.weights()}

    def save(self, directory: Path) -> None:
        """Write ``policy/``, a Hugging Face model with tokenizer, and ``policy_state/`` for `load`."""
        (directory / STATE_DIR).mkdir(parents=True, exist_ok=True)
        first = self._engine.rank == 0
        weights = {name: weight.cpu() for name, weight in self.weights() if first}
        if first:
            self._model.save_pretrained(directory / POLICY_DIR, state_dict=weights)
            self._tokenizer.save_pretrained(directory / POLICY_DIR)
        save_state(self._engine, directory / STATE_DIR)
        dist.barrier()

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote: weights, moments and counters to the last bit.

        Neither the ZeRO stage nor the number of ranks has to be the one that saved. Raises RunError where the
        state belongs to another model or is incomplete.
        """
        load_state(self._engine, directory / STATE_DIR)

    def _agree(self, steps: Sequence[MiniBatch]) -> tuple[list[int], list[int]]:
        """Sampled rows of each mini-batch over all ranks, and the most blocks that any rank has of it."""
        rows = total(torch.tensor([step.rows for step in steps], device=self._device)).tolist()
        passes = largest(torch.tensor([len(step.blocks) for step in steps], device=self._device)).tolist()
        return rows, passes

    def _score_old(self, step: MiniBatch, passes: int) -> None:
        with self._engine.reading():
            for block in self._joined(step.blocks, passes):
                _, logp_A, unit_A = self._score(block)
                if block.row_N.numel():
                    step.old_T[block.action_A], step.old_unit_T[block.action_A] = logp_A, unit_A

    def _accumulate(
        self, step: MiniBatch, *, rows: int, passes: int, unscored: bool, hidden_TP: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one mini-batch; return its `LossSums` on this rank and its largest ratio."""
        sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=self._device)
        ratio_max = torch.zeros((), device=self._device)
        for i, block in enumerate(self._joined(step.blocks, passes)):
            states_SP, logp_A, unit_A = self._score(block)
            loss = 0 * logp_A.sum()
            if block.row_N.numel():
                if unscored:
                    step.old_T[block.action_A], step.old_unit_T[block.action_A] = logp_A.detach(), unit_A
                loss, block_sums, block_max = self._objective.loss(
                    logp_A,
                    old_A=step.old_T[block.action_A],
                    rollout_A=step.rollout_T[block.action_A],
                    reference_A=step.reference_T[block.action_A],
                    advantage_N=step.advantage_N[block.row_N],
                    sampled_N=step.sampled_N[block.row_N],
                    offsets=block.offsets,
                    rows=rows,
                )
                sums += torch.stack([value.double() for value in block_sums])
                ratio_max = torch.maximum(ratio_max, block_max)
            if hidden_TP is not None:
                hidden_TP[block.token_T] = states_SP[block.slot_T]
            self._engine.backward(loss, last=i == passes - 1)
        return sums, ratio_max

    @property
    def _refreshes_in_passing(self) -> bool:
        last_epoch = self._config.feedback.refresh is FeedbackRefresh.last_epoch
        return last_epoch and self._config.uses_feedback

    def _refreshed(
        self, batches: Sequence[PolicyBatch], steps: Sequence[MiniBatch], fresh_TP: Tensor
    ) -> list[Hidden]:
        records = [batch.trajectories for batch in batches]
        if self._config.feedback.refresh is FeedbackRefresh.none:
            return []
        if not self._refreshes_in_passing:
            return self.hidden(records)
        # In the order of the mini-batches.
        order = [i for step in steps for i in step.order]
        found = dict(zip(order, split_hidden([records[i] for i in order], fresh_TP), strict=True))
        return [found[i] for i in range(len(records))]

    def _joined(self, laid: Sequence[Block], passes: int) -> Iterator[Block]:
        """The blocks, then idle ones: every rank runs as many passes, so that collectives match."""
        yield from laid
        for _ in range(passes - len(laid)):
            yield idle_block(self._device)

    def _score(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        states_SP, logp_A, unit_A = self._engine.forward(
            block.input_BL, block.position_BL, block.pick_A, block.label_A
        )
        return states_SP, logp_A, unit_A

    def _states_buffer(self, tokens: int) -> Tensor:
        width = self._scorer.width if self._config.uses_feedback else 0
        # On the device, so that no pass waits for a copy; `split_hidden` copies all of it at once.
        return torch.empty(tokens, width, dtype=self._model.dtype, device=self._device)
