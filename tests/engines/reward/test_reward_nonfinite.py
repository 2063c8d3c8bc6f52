"""What is not finite: passed on by the annotation, never learnt from, never saved; and rows that are odd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_rows import broken_at, parameters, random_batch, states, with_annotation
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from r2m_ray.config.schema import PairSource
from r2m_ray.core.batch import Hidden, Trajectories, pack_rows
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.text import policy_prompt_ids, policy_response_ids
from r2m_ray.errors import RunError

EngineFactory = Callable[..., RewardEngine]


def test_update_that_is_not_finite_is_skipped_and_counted(make_engine: EngineFactory) -> None:
    engine, clean = make_engine(update_steps=2), make_engine(update_steps=2)
    batch = random_batch(1)
    before = engine.digests()
    stats = engine.update([replace(batch, hidden=broken_at(batch.hidden, 3))], 0.6, 1)
    assert (stats["skipped_steps"], stats["nonfinite_steps"], stats["nonfinite_rows"]) == (2, 2, 1)
    assert not math.isfinite(stats["gradient_norm"])
    assert engine.digests() == before
    assert engine.update([batch], 0.6, 2)["skipped_steps"] == 0
    clean.update([batch], 0.6, 2)
    assert engine.digests() == clean.digests()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_row_of_h_breaks_its_own_reward_alone(
    value: float, make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine()
    broken = broken_at(hidden, hidden.layout.slice_of(2).start, value)
    _, clean = engine.annotate(trajectories, hidden, 0.6, 1)
    _, found = engine.annotate(trajectories, broken, 0.6, 1)
    assert torch.isfinite(found.reward_N).tolist() == [n != 2 for n in range(8)]
    others = torch.arange(8) != 2
    assert torch.equal(found.reward_N[others], clean.reward_N[others])
    assert torch.equal(found.frozen_reward_N, clean.frozen_reward_N)


@pytest.mark.parametrize("source", list(PairSource))
@pytest.mark.parametrize("field", ["reward_N", "frozen_reward_N"])
def test_a_broken_annotation_is_not_learnt_from_though_h_is_fine_by_now(
    field: str, source: PairSource, make_engine: EngineFactory
) -> None:
    engine, batch = make_engine(pair_source=source), random_batch(1)
    scores_N = getattr(batch.annotation, field).clone()
    scores_N[3] = math.nan
    before = engine.digests()
    stats = engine.update([random_batch(2), with_annotation(batch, **{field: scores_N})], 0.6, 1)
    assert (stats["skipped_steps"], stats["nonfinite_steps"], stats["nonfinite_rows"]) == (1, 1, 1)
    assert engine.digests() == before
    assert math.isfinite(stats["feedback_ratio"])


@pytest.mark.parametrize("name", ["w_o", "score_weight"])
def test_a_head_that_is_not_finite_is_not_saved(
    name: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine()
    with torch.no_grad():
        engine.head.get_parameter(name).view(-1)[1] = math.inf
    with pytest.raises(RunError, match=rf"{name} of the R2M head: 1 of \d+ values are NaN or infinite"):
        engine.save(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_reward_spike_moves_the_head_by_one_bounded_step(make_engine: EngineFactory) -> None:
    engine, batch = make_engine(learning_rate=1e-2), random_batch(1)
    spike_N = batch.annotation.reward_N.clone()
    spike_N[5] = 1e30
    before = parameters(engine.head)
    stats = engine.update([with_annotation(batch, reward_N=spike_N)], 0.6, 1)
    assert stats["skipped_steps"] == 0
    assert all(math.isfinite(value) for value in stats.values())
    for name, value in engine.head.named_parameters():
        # Adam's first step is at most the learning rate.
        assert (value - before[name]).abs().max() <= 1.001e-2, name


def test_an_empty_response_is_scored_at_its_last_real_token(
    make_engine: EngineFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_reward_dir: Path
) -> None:
    responses = ("", "w20 w21 w22", "", "w23")
    rows = pack_rows(
        ["w1 w2 w3"],
        [policy_prompt_ids(tiny_tokenizer, "w1 w2 w3")],
        [policy_response_ids(tiny_tokenizer, text) for text in responses],
        responses,
        version=0,
    )
    _, found = make_engine().annotate(rows, states(rows.layout, seed=3), 0.6, 1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    with torch.no_grad():
        for n, text in ((0, "w1 w2 w3 <eos>"), (1, "w1 w2 w3 w20 w21 w22 <eos>")):
            direct = float(model(tokenizer(text, return_tensors="pt").input_ids).logits)
            # Batched and single rows take other matrix kernels: a few float32 roundings.
            assert float(found.frozen_reward_N[n]) == pytest.approx(direct, abs=1e-5)
    assert torch.isfinite(found.reward_N).all()
    assert found.response_id_N.tolist() == [0, 1, 0, 3]
