"""People's pairs in the head's update and in its warm-up: which share they have, and what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from heads import grebt
from reward_rows import K, broken_at, parameters, random_batch, with_annotation, with_hidden
from torch import Tensor
from torch.nn.functional import logsigmoid

from r2m_ray.core.batch import RewardBatch
from r2m_ray.core.head import R2MHead
from r2m_ray.engines.reward.engine import RewardEngine

EngineFactory = Callable[..., RewardEngine]


def rewards(head: R2MHead, batches: list[RewardBatch], size: int, omega: float = 0.6) -> Tensor:
    """The head's current rewards, [groups, size]."""
    found = [
        head(b.annotation.rte_ND, b.hidden.hidden_TP, b.annotation.layout.offsets, omega) for b in batches
    ]
    return torch.cat(found).view(-1, size)


def human_loss(head: R2MHead, batches: list[RewardBatch], omega: float = 0.6) -> Tensor:
    chosen, rejected = rewards(head, batches, 2, omega).unbind(1)
    return -logsigmoid(chosen - rejected).mean()


@pytest.fixture
def groups() -> list[RewardBatch]:
    return [random_batch(1), random_batch(2, groups=3)]


@pytest.fixture
def human() -> list[RewardBatch]:
    """Four and two pairs."""
    return [random_batch(11, groups=4, size=2), random_batch(12, groups=2, size=2)]


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_an_anchored_update_is_one_adamw_step_on_the_mix(
    groups: list[RewardBatch],
    human: list[RewardBatch],
    fraction: float,
    entropy_weight: float,
    make_engine: EngineFactory,
) -> None:
    engine = make_engine(anchor_fraction=fraction, entropy_weight=entropy_weight)
    oracle = make_engine().head
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    stats = engine.update(groups, 0.6, 1, human)

    reward_GK = rewards(oracle, groups, K)
    pairs_GK = torch.cat([b.annotation.reward_N for b in groups]).view(-1, K)
    _, sums = grebt(reward_GK, pairs_GK, entropy_weight=entropy_weight)
    own, entropy = sums.bradley_terry / 5, sums.entropy / 5
    people = human_loss(oracle, human)
    loss = (1 - entropy_weight) * ((1 - fraction) * own + fraction * people) + entropy_weight * entropy
    accuracy = float((rewards(oracle, human, 2).diff() < 0).double().mean())
    slopes = torch.autograd.grad(people, list(oracle.parameters()), retain_graph=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    optimizer.step()

    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert stats["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert stats["bradley_terry_human"] == pytest.approx(people.item(), abs=1e-6)
    assert stats["human_accuracy"] == pytest.approx(accuracy)
    human_norm = math.sqrt(sum(slope.square().sum().item() for slope in slopes))
    assert stats["gradient_norm_human"] == pytest.approx(human_norm, rel=1e-5)
    for name, value in oracle.named_parameters():
        # Adam's first step is lr·g/(|g| + 1e-8): a thousandth of it is rounding where g is near 1e-8.
        torch.testing.assert_close(engine.head.get_parameter(name), value, atol=1e-5, rtol=0)


def test_without_an_anchor_human_pairs_are_not_even_read(
    groups: list[RewardBatch], make_engine: EngineFactory
) -> None:
    plain, offered = make_engine(), make_engine()
    unreadable: list[RewardBatch] = [None]  # type: ignore[list-item]
    assert plain.update(groups, 0.6, 1) == offered.update(groups, 0.6, 1, unreadable)
    assert plain.digests() == offered.digests()


def test_human_pairs_alone_leave_the_order_of_the_groups_unheard(
    groups: list[RewardBatch], human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    engines = [make_engine(anchor_fraction=1.0, entropy_weight=0.0) for _ in range(2)]
    stats = engines[0].update(groups, 0.6, 1, human)
    engines[1].update([random_batch(7)], 0.6, 1, human)
    assert engines[0].digests() == engines[1].digests()
    assert stats["loss"] == pytest.approx(stats["bradley_terry_human"])


def test_the_statistics_of_the_groups_are_what_they_are_without_human_pairs(
    groups: list[RewardBatch], human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    plain = make_engine().update(groups, 0.6, 1)
    mixed = make_engine(anchor_fraction=0.5).update(groups, 0.6, 1, human)
    own = plain.keys() - {"loss", "gradient_norm"}
    assert {key: mixed[key] for key in own} == {key: plain[key] for key in own}
    assert mixed.keys() - plain.keys() == {"bradley_terry_human", "human_accuracy", "gradient_norm_human"}


def test_the_chosen_row_wins_whatever_its_annotation_says(
    groups: list[RewardBatch], human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    reversed_rewards = [with_annotation(b, reward_N=-b.annotation.reward_N) for b in human]
    one, other = make_engine(anchor_fraction=1.0), make_engine(anchor_fraction=1.0)
    one.update(groups, 0.6, 1, human)
    other.update(groups, 0.6, 1, reversed_rewards)
    assert one.digests() == other.digests()


def test_a_broken_human_row_skips_the_step_and_is_counted(
    groups: list[RewardBatch], human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    engine = make_engine(anchor_fraction=0.5)
    broken = replace(human[0], hidden=broken_at(human[0].hidden, 0))
    before = engine.digests()
    stats = engine.update(groups, 0.6, 1, [broken, human[1]])
    assert (stats["skipped_steps"], stats["nonfinite_steps"], stats["nonfinite_rows"]) == (1, 1, 1)
    assert engine.digests() == before


def test_a_warm_up_is_adamw_on_human_pairs_at_its_own_rate(
    human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    engine = make_engine(warmup_learning_rate=3e-3, update_steps=0)
    oracle = make_engine().head
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(3):
        loss = human_loss(oracle, human)
        assert engine.warm_up(human, 0.6)["bradley_terry_human"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
    for name, value in oracle.named_parameters():
        # Three of Adam's steps: where a gradient is rounding alone, its sign, and so 2·lr, may differ.
        torch.testing.assert_close(engine.head.get_parameter(name), value, atol=1e-5, rtol=0)


def test_the_first_update_after_a_warm_up_starts_without_moments(
    groups: list[RewardBatch], human: list[RewardBatch], make_engine: EngineFactory
) -> None:
    warmed, fresh = make_engine(), make_engine()
    for _ in range(2):
        warmed.warm_up(human, 0.6)
    fresh.head.load_state_dict(warmed.head.state_dict())
    for step in (1, 2):
        warmed.update(groups, 0.6, step)
        fresh.update(groups, 0.6, step)
    assert warmed.digests() == fresh.digests()


def test_a_warm_up_learns_from_h_what_the_embeddings_do_not_tell(make_engine: EngineFactory) -> None:
    def informative(seed: int) -> RewardBatch:
        """Random embeddings; the states of chosen rows lie 2 higher in one direction than the others."""
        batch = random_batch(seed, groups=16, size=2)
        hidden_TP = batch.hidden.hidden_TP.clone()
        hidden_TP[:, 0] += 2.0 * (batch.hidden.layout.row_T % 2 == 0)
        return with_hidden(batch, hidden_TP)

    rate = {"warmup_learning_rate": 3e-3}
    reads, blind = make_engine(**rate), make_engine(omega_floor=1.0, **rate)
    for seed in range(60):
        batch = informative(seed)
        reads.warm_up([batch], 0.6)
        blind.warm_up([with_hidden(batch, batch.hidden.hidden_TP[:, :0])], 1.0)
    unseen = [informative(seed) for seed in range(100, 110)]
    found = float((rewards(reads.head, unseen, 2).diff() < 0).double().mean())
    embeddings = torch.cat([batch.annotation.rte_ND for batch in unseen])
    refitted = float((blind.head.score(embeddings).view(-1, 2).diff() < 0).double().mean())
    assert found > 0.85
    assert abs(refitted - 0.5) < 0.12


def test_without_feedback_the_same_pairs_refit_the_scoring_head_alone(make_engine: EngineFactory) -> None:
    engine = make_engine(omega_floor=1.0)
    human = [random_batch(11, groups=4, size=2, width=0)]
    before = parameters(engine.head)
    losses = [engine.warm_up(human, 1.0)["bradley_terry_human"] for _ in range(20)]
    moved = {name for name, value in parameters(engine.head).items() if not torch.equal(value, before[name])}
    assert moved == {"score_weight"}
    assert losses[-1] < losses[0]
