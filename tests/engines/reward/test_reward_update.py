"""Updates of the head by the reward engine: what moves, by how much, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from heads import grebt
from reward_rows import K, literal_rewards, parameters, random_batch, states, with_hidden

from r2m_ray.config.schema import PairSource, WoInit
from r2m_ray.core.batch import Annotation, Hidden, Layout, RewardBatch, Trajectories
from r2m_ray.engines.reward.engine import RewardEngine

EngineFactory = Callable[..., RewardEngine]


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pair_source", [source for source in PairSource if source is not PairSource.random])
def test_update_is_one_adamw_step_on_grebt_of_the_whole_batch(
    pair_source: PairSource, entropy_weight: float, make_engine: EngineFactory
) -> None:
    engine = make_engine(pair_source=pair_source, entropy_weight=entropy_weight)
    batches = [random_batch(1), random_batch(2, groups=3)]
    oracle = make_engine().head
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)

    stats = engine.update(batches, 0.6, 1)
    notes = [batch.annotation for batch in batches]
    reward_GK = torch.cat(
        [oracle(b.annotation.rte_ND, b.hidden.hidden_TP, b.hidden.layout.offsets, 0.6) for b in batches]
    ).view(-1, K)
    pairs = {
        PairSource.annotation: torch.cat([note.reward_N for note in notes]),
        PairSource.frozen_rm: torch.cat([note.frozen_reward_N for note in notes]),
        PairSource.recomputed: reward_GK.detach().flatten(),
        PairSource.gold: torch.cat([note.gold_N for note in notes]),
    }[pair_source].view(-1, K)
    loss, _ = grebt(reward_GK, pairs, entropy_weight=entropy_weight)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    optimizer.step()

    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert stats["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, value in oracle.named_parameters():
        # Adam's first step is lr·sign(g): rounding of g matters only where g is itself rounding.
        torch.testing.assert_close(engine.head.get_parameter(name), value, atol=1e-6, rtol=0)


def test_update_statistics_are_those_of_its_rewards(make_engine: EngineFactory) -> None:
    engine = make_engine(learning_rate=0.0, pair_source=PairSource.frozen_rm)
    batches = [random_batch(1), random_batch(2, groups=3)]
    reward_GK = torch.cat(
        [literal_rewards(engine.head, b.annotation.rte_ND, b.hidden, 0.6) for b in batches]
    ).view(-1, K)
    frozen_GK = torch.cat([b.annotation.frozen_reward_N for b in batches]).view(-1, K)
    winner, loser = frozen_GK.argmax(1), frozen_GK.argmin(1)
    margin_G = reward_GK[range(5), winner] - reward_GK[range(5), loser]
    stats = engine.update(batches, 0.6, 1)
    assert stats["margin"] == pytest.approx(margin_G.mean().item(), abs=1e-5)
    assert stats["flip_rate"] == (margin_G < 0).double().mean().item()
    assert 0 < stats["flip_rate"] < 1
    assert stats["group_std"] == pytest.approx(reward_GK.std(1, correction=0).mean().item(), abs=1e-5)
    assert stats["bradley_terry"] == pytest.approx(torch.log1p(torch.exp(-margin_G)).mean().item(), abs=1e-5)
    assert stats["loss"] == pytest.approx(0.7 * stats["bradley_terry"] + 0.3 * stats["entropy"], abs=1e-6)
    assert stats["valid_pairs"] == stats["valid_groups"] == 1.0


def test_gradient_norms_are_those_of_the_single_losses(make_engine: EngineFactory) -> None:
    batch = [random_batch(1)]
    both = make_engine().update(batch, 0.6, 1)
    only_bt = make_engine(entropy_weight=0.0).update(batch, 0.6, 1)
    only_gre = make_engine(entropy_weight=1.0).update(batch, 0.6, 1)
    assert both["gradient_norm_bradley_terry"] == pytest.approx(only_bt["gradient_norm"], rel=1e-6)
    assert both["gradient_norm_entropy"] == pytest.approx(only_gre["gradient_norm"], rel=1e-6)


def test_attention_statistics_of_known_cases(make_engine: EngineFactory) -> None:
    batch = random_batch(1)
    equal = with_hidden(batch, torch.ones_like(batch.hidden.hidden_TP))
    lengths = batch.hidden.layout.lengths
    stats = make_engine(wo_init=WoInit.zero).update([equal], 0.6, 1)
    # Equal states share the attention equally: the entropy of a row is log of its length, 0 for one token.
    assert stats["attention_entropy"] == pytest.approx((lengths > 1).double().mean().item(), abs=1e-6)
    assert stats["feedback_ratio"] == 0.0
    assert make_engine().update([batch], 0.6, 1)["feedback_ratio"] > 0.1


def test_recomputed_pairs_never_flip(make_engine: EngineFactory) -> None:
    batches = [random_batch(seed) for seed in range(4)]
    stats = make_engine(pair_source=PairSource.recomputed).update(batches, 0.6, 1)
    assert stats["flip_rate"] == 0.0
    assert stats["margin"] > 0


def test_update_never_runs_the_trunk_and_moves_the_head_alone(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine()
    _, annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    trunk_before = {name: value.clone() for name, value in engine.trunk.model.state_dict().items()}
    calls: list[object] = []
    engine.trunk.model.register_forward_pre_hook(lambda *args: calls.append(args))
    head_before = parameters(engine.head)
    hidden_before = hidden.hidden_TP.clone()
    engine.update([RewardBatch(hidden=hidden, annotation=annotation)], 0.6, 1)
    assert not calls
    assert all(
        torch.equal(value, trunk_before[name]) for name, value in engine.trunk.model.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in engine.trunk.model.parameters())
    assert all(not torch.equal(value, head_before[name]) for name, value in parameters(engine.head).items())
    assert torch.equal(hidden.hidden_TP, hidden_before)
    # The frozen reward stays the original model's, though φ has moved.
    _, again = engine.annotate(trajectories, hidden, 1.0, 2)
    assert torch.equal(again.frozen_reward_N, annotation.frozen_reward_N)
    assert not torch.equal(again.reward_N, again.frozen_reward_N)


def test_paper_learning_rate_moves_nearly_all_weights(make_engine: EngineFactory) -> None:
    # At the paper's 0.02, where a float32 step of 1e-6 is not lost.
    engine = make_engine(learning_rate=1e-6, init_std=0.02)
    before = parameters(engine.head)
    engine.update([random_batch(1)], 0.6, 1)
    after = parameters(engine.head)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in before])
    assert moved.double().mean() > 0.99


def test_frozen_head_is_measured_and_not_changed(make_engine: EngineFactory) -> None:
    frozen = make_engine(update_steps=0)
    before = frozen.digests()
    stats = frozen.update([random_batch(1)], 0.6, 1)
    assert frozen.digests() == before
    expected = make_engine().update([random_batch(1)], 0.6, 1)
    assert stats.items() <= expected.items()
    assert expected.keys() - stats.keys() == {
        "gradient_norm",
        "gradient_norm_bradley_terry",
        "gradient_norm_entropy",
        "skipped_steps",
        "nonfinite_steps",
    }


def test_a_head_that_reads_nothing_and_learns_nothing_has_no_statistics(make_engine: EngineFactory) -> None:
    assert make_engine(update_steps=0, omega_floor=1.0).update([random_batch(1)], 1.0, 1) == {}


def test_without_feedback_only_the_scoring_head_moves(
    make_engine: EngineFactory, trajectories: Trajectories
) -> None:
    engine = make_engine(omega_floor=1.0)
    empty = states(trajectories.layout, seed=0, width=0)
    _, annotation = engine.annotate(trajectories, empty, 1.0, 1)
    before = parameters(engine.head)
    stats = engine.update([RewardBatch(hidden=empty, annotation=annotation)], 1.0, 1)
    moved = {name for name, value in parameters(engine.head).items() if not torch.equal(value, before[name])}
    assert moved == {"score_weight"}
    assert stats["feedback_ratio"] == 0.0


def test_several_update_steps_are_repeated_single_ones(make_engine: EngineFactory) -> None:
    twice, once = make_engine(update_steps=2), make_engine()
    stats = twice.update([random_batch(1)], 0.6, 1)
    first = once.update([random_batch(1)], 0.6, 1)
    once.update([random_batch(1)], 0.6, 1)
    assert twice.digests() == once.digests()
    assert stats == first


def test_update_does_not_depend_on_the_cut_into_shards(make_engine: EngineFactory) -> None:
    one, other = random_batch(1), random_batch(2)
    notes = (one.annotation, other.annotation)
    tensors = [field.name for field in fields(Annotation) if field.name != "layout"]
    layout = Layout.from_lengths([*one.hidden.layout.lengths, *other.hidden.layout.lengths], K)
    joined = RewardBatch(
        hidden=Hidden(layout=layout, hidden_TP=torch.cat([one.hidden.hidden_TP, other.hidden.hidden_TP])),
        annotation=Annotation(
            layout=layout,
            **{name: torch.cat([getattr(note, name) for note in notes]) for name in tensors},
        ),
    )
    whole, cut = make_engine(), make_engine()
    whole_stats, cut_stats = whole.update([joined], 0.6, 1), cut.update([one, other], 0.6, 1)
    assert whole_stats == pytest.approx(cut_stats, abs=1e-5)
    for name, value in parameters(cut.head).items():
        torch.testing.assert_close(parameters(whole.head)[name], value, atol=1e-6, rtol=0)


def test_groups_that_teach_nothing_move_nothing_even_by_momentum(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.update([random_batch(1)], 0.6, 1)
    before = engine.digests()
    stats = engine.update([random_batch(2, tied=2)], 0.6, 2)
    assert engine.digests() == before
    assert (stats["skipped_steps"], stats["nonfinite_steps"]) == (1, 0)
    assert stats["valid_pairs"] == stats["loss"] == 0.0
    assert math.isnan(stats["margin"])
