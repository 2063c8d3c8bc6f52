"""One learner rank: its updates equal a plain PyTorch loop's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_rows import BATCHES, IDS, assert_equal, learner, learner_config, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from r2m_ray.config.schema import (
    Advantage,
    Config,
    FeedbackRefresh,
    OldLogprobs,
    Ratio,
)
from r2m_ray.core.batch import PolicyBatch

pytestmark = pytest.mark.usefixtures("one_rank")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class PlainLoop:
    """The same algorithm without packing, DeepSpeed or stored log-probs: one row at a time."""

    def __init__(self, config: Config, model_dir: Path) -> None:
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(model_dir)
        self.old = AutoModelForCausalLM.from_pretrained(model_dir)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.policy.learning_rate, eps=1e-2, weight_decay=0.0
        )

    def logp(self, model: torch.nn.Module, batch: PolicyBatch, row: int, temperature: float) -> Tensor:
        part = batch.trajectories.layout.slice_of(row)
        logits = model(batch.trajectories.input_T[part][None]).logits[0] / temperature
        logp_T = torch.log_softmax(logits, -1)
        label_T = batch.trajectories.label_T[part]
        return logp_T.gather(-1, label_T[:, None])[:, 0][batch.trajectories.action_T[part]]

    def step(self, shards: list[PolicyBatch]) -> float:
        algo = self.config.algo
        rows = sum(batch.trajectories.layout.rows for batch in shards)
        self.optimizer.zero_grad()
        for batch in shards:
            for row in range(batch.trajectories.layout.rows):
                part = batch.trajectories.layout.slice_of(row)
                logp = self.logp(self.model, batch, row, algo.temperature)
                with torch.no_grad():
                    old = self.logp(self.old, batch, row, algo.temperature)
                reference = batch.reference.tempered_T[part][batch.trajectories.action_T[part]]
                rho, advantage = (logp - old).sum().exp(), batch.advantage_N[row]
                surrogate = torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
                kl = (torch.exp(reference - logp) - 1 - (reference - logp)).sum()
                ((-surrogate + algo.kl_weight * kl) / rows).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.policy.max_grad_norm)
        self.optimizer.step()
        return norm.item()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_update_equals_a_plain_loop(stage: int, tiny_policy_dir: Path) -> None:
    config = learner_config(stage)
    policy = learner(config, tiny_policy_dir)
    stats, hidden = policy.update(BATCHES, IDS)

    plain = PlainLoop(config, tiny_policy_dir)
    norms, fresh = [], {}
    for epoch in range(2):
        for m, shards in enumerate((BATCHES[:2], BATCHES[2:])):
            if epoch == 1:
                with torch.no_grad():
                    fresh[m] = [
                        plain.model.base_model(
                            b.trajectories.input_T[b.trajectories.layout.slice_of(n)][None]
                        )
                        for b in shards
                        for n in range(b.trajectories.layout.rows)
                    ]
            norms.append(plain.step(shards))
    expected = dict(plain.model.named_parameters())
    assert_close(weights(policy), {n: p.detach() for n, p in expected.items()}, atol=1e-6)
    assert stats["grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (4, 0)
    found_TP = torch.cat([shard.hidden_TP for shard in hidden])
    expected_TP = torch.cat([o.last_hidden_state[0] for m in (0, 1) for o in fresh[m]])
    torch.testing.assert_close(found_TP, expected_TP, atol=1e-5, rtol=0)


def test_statistics_of_the_sampling_policy(config: Config, tiny_policy_dir: Path) -> None:
    """KL, entropy and mismatch are π_old's: those of the weights before the update."""
    stats, _ = learner(config, tiny_policy_dir).update(BATCHES, IDS)
    plain = PlainLoop(config, tiny_policy_dir)
    old, unit, reference, rollout = [], [], [], []
    with torch.no_grad():
        for batch in BATCHES:
            action_T = batch.trajectories.action_T
            for row in range(batch.trajectories.layout.rows):
                old.append(plain.logp(plain.old, batch, row, config.algo.temperature))
                unit.append(plain.logp(plain.old, batch, row, 1.0))
            reference.append(batch.reference.unit_T[action_T])
            rollout.append(batch.trajectories.rollout_logp_T[action_T])
    old_A, unit_A, reference_A, rollout_A = map(torch.cat, (old, unit, reference, rollout))
    expected = {
        "kl_token": (unit_A - reference_A).mean(),
        "kl_sequence": (unit_A - reference_A).sum() / 24,
        "entropy": -old_A.mean(),
        "mismatch_mean": (old_A - rollout_A).abs().mean(),
        "mismatch_kl": (rollout_A - old_A).mean(),
        "mismatch_max": (old_A - rollout_A).abs().max(),
        "tokens": len(old_A),
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_token_budget_and_checkpointing_do_not_matter(config: Config, tiny_policy_dir: Path) -> None:
    found = []
    for budget, checkpointing in ((1, False), (10_000, False), (64, True)):
        config.policy.tokens_per_microbatch = budget
        config.policy.gradient_checkpointing = checkpointing
        policy = learner(config, tiny_policy_dir)
        stats, _ = policy.update(BATCHES, IDS)
        found.append((weights(policy), stats))
    assert [stats["microbatches"] for _, stats in found] == [2 * 24, 2 * 2, found[2][1]["microbatches"]]
    for weight, stats in found[1:]:
        assert_close(weight, found[0][0], atol=1e-6)
        assert stats["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-4)


def test_order_of_shards_does_not_matter(config: Config, tiny_policy_dir: Path) -> None:
    first, second = learner(config, tiny_policy_dir), learner(config, tiny_policy_dir)
    _, hidden = first.update(BATCHES, IDS)
    _, reversed_hidden = second.update(BATCHES[::-1], IDS[::-1])
    assert_equal(weights(second), weights(first))
    for shard, other in zip(hidden, reversed_hidden[::-1], strict=True):
        assert torch.equal(shard.hidden_TP, other.hidden_TP)


def test_old_log_probs_of_an_equal_engine_change_nothing(config: Config, tiny_policy_dir: Path) -> None:
    """With one mini-batch and no mismatch the two sources of π_old are one."""
    plain = PlainLoop(config, tiny_policy_dir)
    shards = []
    for batch in BATCHES[:2]:
        with torch.no_grad():
            rows = range(batch.trajectories.layout.rows)
            logp_A = torch.cat([plain.logp(plain.old, batch, row, 0.7) for row in rows])
        exact_T = torch.zeros(batch.trajectories.layout.tokens)
        exact_T[batch.trajectories.action_T] = logp_A
        shards.append(replace(batch, trajectories=replace(batch.trajectories, rollout_logp_T=exact_T)))
    found = []
    for source in OldLogprobs:
        config.algo.old_logp = source
        policy = learner(config, tiny_policy_dir)
        stats, _ = policy.update(shards, IDS[:2])
        assert stats["mismatch_max"] < 1e-4
        found.append(weights(policy))
    assert_close(found[1], found[0], atol=1e-6)


def test_a_mismatched_engine_is_weighted_and_bounded(config: Config, tiny_policy_dir: Path) -> None:
    """Rows that the engine found e^100 times likelier than the learner does get no weight at all."""
    config.algo.old_logp, config.algo.kl_weight = OldLogprobs.rollout, 0.0
    shards = [
        replace(
            batch,
            trajectories=replace(
                batch.trajectories, rollout_logp_T=torch.where(batch.trajectories.action_T, 100.0, 0)
            ),
        )
        for batch in BATCHES
    ]
    policy = learner(config, tiny_policy_dir)
    stats, _ = policy.update(shards, IDS)
    assert stats["mismatch_mean"] > 100
    # e^−20 is what the clamp of log ρ leaves.
    assert stats["grad_norm"] < 1e-5


def test_the_mismatch_is_the_engines_and_not_the_policys_own_movement(
    config: Config, tiny_policy_dir: Path
) -> None:
    """With old_logp=rollout the second mini-batch is first scored after a step, and is left out."""
    config.algo.old_logp = OldLogprobs.rollout
    stats, _ = learner(config, tiny_policy_dir).update(BATCHES, IDS)
    first, _ = learner(config, tiny_policy_dir).update(BATCHES[:2], IDS[:2])
    for name in ("mismatch_mean", "mismatch_kl", "mismatch_max"):
        assert stats[name] == first[name], name
    assert stats["tokens"] > first["tokens"]


def test_warm_up_is_linear(config: Config, tiny_policy_dir: Path) -> None:
    config.policy.warmup_steps = 8
    policy = learner(config, tiny_policy_dir)
    rates = [policy.update(BATCHES, IDS)[0]["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_refreshed_states(config: Config, tiny_policy_dir: Path) -> None:
    config.algo.epochs = 1
    records = [batch.trajectories for batch in BATCHES]
    found = {}
    for refresh in FeedbackRefresh:
        config.feedback.refresh = refresh
        policy = learner(config, tiny_policy_dir)
        before = policy.hidden(records)
        _, fresh = policy.update(BATCHES, IDS)
        found[refresh] = (before, fresh, policy.hidden(records))
    assert found[FeedbackRefresh.none][1] == []
    before, fresh, _ = found[FeedbackRefresh.last_epoch]
    # The first mini-batch of the only epoch saw the weights from before its step, the second did not.
    assert torch.allclose(fresh[0].hidden_TP, before[0].hidden_TP, atol=1e-5)
    assert not torch.allclose(fresh[2].hidden_TP, before[2].hidden_TP, atol=1e-3)
    _, fresh, after = found[FeedbackRefresh.exact]
    for shard, expected, batch in zip(fresh, after, BATCHES, strict=True):
        assert torch.equal(shard.hidden_TP, expected.hidden_TP)
        assert torch.equal(shard.layout.offsets, batch.trajectories.layout.offsets)


def test_a_run_without_feedback_exports_no_states(config: Config, tiny_policy_dir: Path) -> None:
    config.reward.omega_floor = 1.0
    policy = learner(config, tiny_policy_dir)
    _, fresh = policy.update(BATCHES, IDS)
    for shard, batch in zip(fresh, BATCHES, strict=True):
        assert shard.hidden_TP.shape == (batch.trajectories.layout.tokens, 0)
        assert policy.hidden([batch.trajectories])[0].hidden_TP.shape == shard.hidden_TP.shape


def test_greedy_baselines_are_no_samples(config: Config, tiny_policy_dir: Path) -> None:
    """Row 0 of each group is ReMax's baseline: its log-probs are not at the sampling temperature."""
    config.algo.advantage, config.algo.ratio = Advantage.remax, Ratio.token
    expected, _ = learner(config, tiny_policy_dir).update(BATCHES, IDS)
    shards = []
    for batch in BATCHES:
        rows = batch.trajectories
        greedy_T = rows.action_T & (rows.layout.row_T % rows.layout.group_size == 0)
        absurd_T = torch.where(greedy_T, -50.0, rows.rollout_logp_T)
        shards.append(replace(batch, trajectories=replace(rows, rollout_logp_T=absurd_T)))
    found, _ = learner(config, tiny_policy_dir).update(shards, IDS)
    assert found == expected
    assert found["mismatch_max"] < 40
