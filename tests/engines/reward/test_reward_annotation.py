"""Annotation of a shard by the reward engine: Eqs. 3 and 4, the frozen score, and noise in h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_rows import K, literal_rewards, states
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from r2m_ray.config.schema import PairSource
from r2m_ray.core.batch import Hidden, Layout, RewardBatch, Trajectories
from r2m_ray.engines.reward.engine import RewardEngine, gaussian_feedback
from r2m_ray.errors import RunError

EngineFactory = Callable[..., RewardEngine]


def test_reward_is_equations_3_and_4(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine()
    scores, annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    for field in ("reward_N", "frozen_reward_N", "response_id_N"):
        assert torch.equal(getattr(scores, field), getattr(annotation, field)), field
    expected = literal_rewards(engine.head, annotation.rte_ND, hidden, 0.6)
    torch.testing.assert_close(annotation.reward_N.double(), expected, atol=1e-5, rtol=0)
    assert (annotation.reward_N - annotation.frozen_reward_N).abs().min() > 1e-3


def test_frozen_reward_is_transformers_own(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden, tiny_reward_dir: Path
) -> None:
    _, annotation = make_engine().annotate(trajectories, hidden, 0.6, 1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    for n, (prompt, response) in enumerate(
        zip(trajectories.row_prompts, trajectories.responses, strict=True)
    ):
        ids = tokenizer(f"{prompt} {response} <eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            # Batched and single rows take other matrix kernels: a few float32 roundings.
            assert float(annotation.frozen_reward_N[n]) == pytest.approx(float(model(ids).logits), abs=1e-5)


def test_omega_one_is_the_frozen_reward_exactly(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    _, annotation = make_engine().annotate(trajectories, hidden, 1.0, 1)
    assert torch.equal(annotation.reward_N, annotation.frozen_reward_N)


def test_vanilla_takes_no_hidden_states(make_engine: EngineFactory, trajectories: Trajectories) -> None:
    engine = make_engine(omega_floor=1.0, update_steps=0)
    empty = states(trajectories.layout, seed=0, width=0)
    _, annotation = engine.annotate(trajectories, empty, 1.0, 1)
    assert torch.equal(annotation.reward_N, annotation.frozen_reward_N)
    assert engine.head.w_k.shape == (0, 16)


def test_annotation_repeats_and_leaves_hidden_states_alone(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    before = hidden.hidden_TP.clone()
    for noise in (0.0, 0.5):
        _, one = make_engine(noise=noise).annotate(trajectories, hidden, 0.6, 3)
        _, other = make_engine(noise=noise).annotate(trajectories, hidden, 0.6, 3)
        assert torch.equal(one.reward_N, other.reward_N)
        assert torch.equal(one.rte_ND, other.rte_ND)
    assert torch.equal(hidden.hidden_TP, before)


def test_bfloat16_hidden_states_are_read_as_their_float32_values(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    narrow = replace(hidden, hidden_TP=hidden.hidden_TP.bfloat16())
    wide = replace(hidden, hidden_TP=narrow.hidden_TP.float())
    engine = make_engine()
    rewards = [engine.annotate(trajectories, h, 0.6, 1)[1].reward_N for h in (narrow, wide)]
    assert torch.equal(*rewards)


def test_reward_model_reads_text_with_its_own_vocabulary(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    _, annotation = make_engine().annotate(trajectories, hidden, 0.6, 1)
    # The reward model's 128 words end at w123: w140 and w141 are the same unknown word to it alone.
    assert float(annotation.frozen_reward_N[4]) == pytest.approx(
        float(annotation.frozen_reward_N[5]), abs=1e-6
    )
    assert annotation.response_id_N.tolist() == [0, 1, 0, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("width", [63, 0])
def test_hidden_states_of_another_policy_are_refused(
    width: int, make_engine: EngineFactory, trajectories: Trajectories
) -> None:
    with pytest.raises(RunError, match=rf"h is \[\d+, {width}\] in 8 rows, but the shard needs \[\d+, 64\]"):
        make_engine().annotate(trajectories, states(trajectories.layout, seed=0, width=width), 0.6, 1)


def test_hidden_states_of_other_rows_are_refused(
    make_engine: EngineFactory, trajectories: Trajectories
) -> None:
    lengths = trajectories.layout.lengths.flip(0).tolist()
    with pytest.raises(RunError, match="exported for other rows"):
        make_engine().annotate(trajectories, states(Layout.from_lengths(lengths, K), seed=0), 0.6, 1)


def test_attention_is_the_softmax_of_equation_3(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine()
    _, annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    weight_T = engine.attention(hidden, annotation)
    head = engine.head
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)]
        query = annotation.rte_ND[n] @ head.w_q.detach()
        expected = torch.softmax(query @ (h @ head.w_k.detach()).T / 4, 0)
        torch.testing.assert_close(weight_T[hidden.layout.slice_of(n)], expected, atol=1e-5, rtol=0)


def test_noise_has_the_mean_and_deviation_of_each_feature() -> None:
    scale_P, shift_P = torch.tensor([1.0, 5.0, 0.0]), torch.tensor([0.0, -3.0, 7.0])
    hidden_TP = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1)) * scale_P + shift_P
    noisy_TP = gaussian_feedback(hidden_TP, 1.0, seed=5)
    # Four standard errors of a mean and of a deviation of 20 000 draws: 4/√20000 and 4/√40000.
    assert ((noisy_TP.mean(0) - hidden_TP.mean(0)).abs() <= 0.029 * scale_P).all()
    assert ((noisy_TP.std(0) - hidden_TP.std(0)).abs() <= 0.02 * scale_P).all()
    correlation = torch.corrcoef(torch.stack([hidden_TP[:, 0], noisy_TP[:, 0]]))[0, 1]
    assert abs(correlation) < 0.029
    half_TP = gaussian_feedback(hidden_TP, 0.5, seed=5)
    torch.testing.assert_close(half_TP, (hidden_TP + noisy_TP) / 2)


def test_noise_is_fresh_at_every_step_and_at_the_update(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine(noise=1.0, learning_rate=0.0, pair_source=PairSource.recomputed)
    one, other = (engine.annotate(trajectories, hidden, 0.6, step)[1] for step in (1, 2))
    assert torch.equal(one.rte_ND, other.rte_ND)
    assert (one.reward_N - other.reward_N).abs().min() > 1e-4
    batch = RewardBatch(hidden=hidden, annotation=one)
    stds = [engine.update([batch], 0.6, step)["group_std"] for step in (1, 2, 1)]
    annotated = float(one.reward_N.view(-1, K).std(1, correction=0).mean())
    assert stds[0] == stds[2]
    assert len({annotated, *stds}) == 3


def test_full_noise_ignores_the_order_of_the_states(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine(noise=1.0)
    shuffled = replace(hidden, hidden_TP=hidden.hidden_TP.flip(0))
    rewards = [engine.annotate(trajectories, h, 0.6, 1)[1].reward_N for h in (hidden, shuffled)]
    torch.testing.assert_close(*rewards, atol=1e-5, rtol=0)
