"""Controls of the reward side: gold that picks pairs or trains beside, pairs at random, pairs by margin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reward_rows import K, random_batch, with_annotation

from r2m_ray.config.schema import PairSource
from r2m_ray.core.batch import Annotation, Hidden, RewardBatch, Trajectories
from r2m_ray.core.reward_loss import group_pairs
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.reward.trainer import content_seed, random_ranks

EngineFactory = Callable[..., RewardEngine]


def words(prompt: str, response: str, truncated: bool) -> dict[str, float]:
    """A gold score: the response's words minus the prompt's, and 10 less if truncated."""
    longer = float(len(response.split()) - len(prompt.split()))
    return {"longer": longer, "cut": float(truncated), "total": longer - 10.0 * truncated}


def test_annotation_carries_gold_of_every_row(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    rows = replace(trajectories, truncated_N=torch.arange(8) == 3)
    scores, annotation = make_engine(gold=words).annotate(rows, hidden, 0.6, 1)
    assert annotation.gold_N.dtype == torch.float32
    assert annotation.gold_N.tolist() == [-1, -2, -1, -10, -5, -5, -2, -4]
    assert {part: value_N.tolist() for part, value_N in scores.gold.items()} == {
        "longer": [-1, -2, -1, 0, -5, -5, -2, -4],
        "cut": [0, 0, 0, 1, 0, 0, 0, 0],
        "total": annotation.gold_N.tolist(),
    }
    assert {value_N.dtype for value_N in scores.gold.values()} == {torch.float64}
    unknown, annotation = make_engine().annotate(rows, hidden, 0.6, 1)
    assert unknown.gold == {}
    assert annotation.gold_N.isnan().all()


@pytest.mark.parametrize("omega", [0.6, 1.0])
def test_gold_as_reward_leaves_the_models_own_reading_as_it_is(
    omega: float, make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    _, plain = make_engine().annotate(trajectories, hidden, omega, 1)
    _, beside = make_engine(gold=words, gold_weight=1.0).annotate(trajectories, hidden, omega, 1)
    assert torch.equal(beside.reward_N, plain.reward_N)
    assert torch.equal(beside.frozen_reward_N, plain.frozen_reward_N)
    assert torch.equal(beside.rte_ND, plain.rte_ND)
    # What gold would have made of the rewards is something else.
    assert not torch.allclose(beside.gold_N, plain.reward_N, atol=0.1)


def test_gold_picks_the_pairs_that_it_orders(make_engine: EngineFactory) -> None:
    batch = random_batch(1)
    by_gold, by_reward = make_engine(pair_source=PairSource.gold), make_engine()
    stats = by_gold.update([batch], 0.6, 1)
    assert stats == by_reward.update([with_annotation(batch, reward_N=batch.annotation.gold_N)], 0.6, 1)
    assert by_gold.digests() == by_reward.digests()
    own = make_engine()
    own.update([batch], 0.6, 1)
    assert own.digests() != by_gold.digests()


def test_without_gold_there_is_no_pair(make_engine: EngineFactory) -> None:
    batch = random_batch(1)
    unknown = with_annotation(batch, gold_N=batch.annotation.gold_N * math.nan)
    stats = make_engine(pair_source=PairSource.gold).update([unknown], 0.6, 1)
    assert (stats["valid_pairs"], stats["valid_groups"], stats["nonfinite_steps"]) == (0, 1, 0)


def test_random_pairs_repeat_and_depend_on_seed_step_and_shard_alone(make_engine: EngineFactory) -> None:
    def margins(step: int, seed: int, groups: int = 16, content: int = 3) -> float:
        engine = make_engine(pair_source=PairSource.random, learning_rate=0.0, seed=seed, update_steps=2)
        return engine.update([random_batch(content, groups=groups)], 1.0, step)["margin"]

    assert margins(1, 0) == margins(1, 0)
    # At ω = 1 an unseeded head is the frozen model: seed, step and content change the pairs and nothing else.
    assert len({margins(1, 0), margins(2, 0), margins(1, 1), margins(1, 0, content=4)}) == 4


def test_random_pairs_are_the_same_in_every_optimizer_step_of_a_training_step(
    make_engine: EngineFactory,
) -> None:
    batch = random_batch(1)
    ranks_N = random_ranks(batch.annotation, content_seed("0 7 pairs", batch.annotation.rte_ND))
    drawn, given = make_engine(pair_source=PairSource.random, update_steps=3), make_engine(update_steps=3)
    assert drawn.update([batch], 0.6, 7) == given.update([with_annotation(batch, reward_N=ranks_N)], 0.6, 7)
    assert drawn.digests() == given.digests()


def test_every_ordered_pair_of_distinct_rows_is_drawn_as_often() -> None:
    annotation: Annotation = random_batch(1, groups=6000).annotation
    ranks_GK = random_ranks(annotation, 5).view(-1, K)
    assert torch.equal(ranks_GK.sort(1).values, torch.arange(4.0).expand(6000, K))
    winner_G, loser_G, valid_G = group_pairs(ranks_GK, annotation.response_id_N.view(-1, K))
    assert valid_G.all()
    counts = torch.bincount(K * winner_G + loser_G, minlength=K * K).view(K, K)
    assert counts.diagonal().tolist() == [0] * K
    # 500 expected of each; five standard deviations of a binomial with p = 1/12.
    deviation = math.sqrt(6000 / 12 * 11 / 12)
    assert (counts[~torch.eye(K, dtype=torch.bool)] - 500).abs().max() < 5 * deviation


def test_pairs_below_the_margin_are_not_learned_from(make_engine: EngineFactory) -> None:
    batch = random_batch(1, groups=3)
    reward_N = torch.tensor([0, 1, 2, 3, 0, 0.5, 0.2, 0, 0, 0, 0, 2.0])
    wide = with_annotation(batch, reward_N=reward_N)
    found = make_engine(pair_min_margin=2.0).update([wide], 0.6, 1)
    assert (found["valid_pairs"], found["valid_groups"]) == (pytest.approx(2 / 3), 1.0)
    tied = with_annotation(batch, reward_N=torch.where(torch.arange(12) // K == 1, 0.0, reward_N))
    expected = make_engine().update([tied], 0.6, 1)
    assert found == expected
    assert make_engine(pair_min_margin=3.5).update([wide], 0.6, 1)["valid_pairs"] == 0.0


@pytest.mark.parametrize("omega", [0.6, 0.8])
def test_omega_alone_is_the_score_of_the_shrunken_embedding(
    omega: float, make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine(init_std=0.0, update_steps=0)
    _, annotation = engine.annotate(trajectories, hidden, omega, 1)
    expected = omega * annotation.rte_ND.double() @ engine.head.score_weight.detach().double()
    torch.testing.assert_close(annotation.reward_N.double(), expected, atol=1e-5, rtol=0)
    stats = engine.update([RewardBatch(hidden=hidden, annotation=annotation)], omega, 1)
    assert stats["feedback_ratio"] == 0.0
