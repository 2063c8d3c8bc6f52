"""The reward engine: R2M rewards of a shard, updates of the head alone, and its state on disk.

Axes as in the package: G groups, K rows per group, N rows, T packed tokens, P policy width, D reward width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from r2m_ray.batch import Annotation, Hidden, Layout, RewardBatch, Trajectories, pack_rows
from r2m_ray.config import Config, FeedbackConfig, PairSource, RewardConfig, WoInit
from r2m_ray.core.head import R2MHead
from r2m_ray.core.reward_loss import grebt
from r2m_ray.errors import InputError, RunError
from r2m_ray.models.reward import RewardEngine, gaussian_feedback
from r2m_ray.models.reward_head import load_head
from r2m_ray.models.text import policy_prompt_ids, policy_response_ids

P, D, K = 64, 48, 4
PROMPTS = ("w1 w2 w3", "w4 w5 w6 w7 w8 w9")
RESPONSES = ("w20 w21", "w22", "w20 w21", "w23 w24 w25", "w140", "w141", "w26 w27 w28 w29", "w30 w31")
EngineFactory = Callable[..., RewardEngine]


@pytest.fixture
def make_engine(tiny_reward_dir: Path) -> EngineFactory:
    """Engines on the tiny reward model; keywords are fields of ``reward``, `noise` of ``feedback``."""

    def make(*, noise: float = 0.0, **fields: object) -> RewardEngine:
        defaults = {"attention_width": 16, "init_std": 0.2, "learning_rate": 1e-2, "max_length": 256}
        config = Config(
            reward=RewardConfig(**{**defaults, **fields}),  # type: ignore[arg-type]
            feedback=FeedbackConfig(noise=noise),
        )
        return RewardEngine(
            config=config,
            model_dir=str(tiny_reward_dir),
            policy_width=P,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture(scope="module")
def trajectories(tiny_tokenizer: PreTrainedTokenizerFast) -> Trajectories:
    return pack_rows(
        PROMPTS,
        [policy_prompt_ids(tiny_tokenizer, text) for text in PROMPTS],
        [policy_response_ids(tiny_tokenizer, text) for text in RESPONSES],
        RESPONSES,
        version=0,
    )


@pytest.fixture(scope="module")
def hidden(trajectories: Trajectories) -> Hidden:
    return states(trajectories.layout, seed=0)


def states(layout: Layout, *, seed: int, width: int = P) -> Hidden:
    values = torch.randn(layout.tokens, width, generator=torch.Generator().manual_seed(seed))
    return Hidden(layout=layout, hidden_TP=values)


def random_batch(seed: int, *, groups: int = 2) -> RewardBatch:
    """A shard with made-up embeddings and rewards, rows of 1 … 12 tokens, all responses distinct."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * K
    lengths = torch.randint(1, 13, (rows,), generator=generator).tolist()
    layout = Layout.from_lengths(lengths, K)
    annotation = Annotation(
        layout=layout,
        reward_N=torch.randn(rows, generator=generator),
        frozen_reward_N=torch.randn(rows, generator=generator),
        rte_ND=torch.randn(rows, D, generator=generator),
        response_id_N=torch.arange(rows),
    )
    return RewardBatch(hidden=states(layout, seed=seed), annotation=annotation)


def parameters(engine: RewardEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.head.named_parameters()}


def equation_3_and_4(head: R2MHead, rte_ND: Tensor, hidden: Hidden, omega: float) -> Tensor:
    """The reward in float64 with keys and values formed as the paper writes them."""
    w = {name: value.detach().double() for name, value in head.named_parameters()}
    rewards = []
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)].double()
        last = rte_ND[n].double()
        scores = (last @ w["w_q"]) @ (h @ w["w_k"]).T / math.sqrt(w["w_q"].shape[1])
        feedback = torch.softmax(scores, 0) @ (h @ w["w_v"]) @ w["w_o"]
        rewards.append(((1 - omega) * feedback + omega * last) @ w["score_weight"])
    return torch.stack(rewards)


# Annotation.


def test_reward_is_equations_3_and_4(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    engine = make_engine()
    annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    expected = equation_3_and_4(engine.head, annotation.rte_ND, hidden, 0.6)
    torch.testing.assert_close(annotation.reward_N.double(), expected, atol=1e-5, rtol=0)
    assert (annotation.reward_N - annotation.frozen_reward_N).abs().min() > 1e-3


def test_frozen_reward_is_transformers_own(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden, tiny_reward_dir: Path
) -> None:
    annotation = make_engine().annotate(trajectories, hidden, 0.6, 1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    for n, (prompt, response) in enumerate(zip(trajectories.row_prompts, RESPONSES, strict=True)):
        ids = tokenizer(f"{prompt} {response} <eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            # Batched and single rows take other matrix kernels: a few float32 roundings.
            assert float(annotation.frozen_reward_N[n]) == pytest.approx(float(model(ids).logits), abs=1e-5)


def test_omega_one_is_the_frozen_reward_exactly(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    annotation = make_engine().annotate(trajectories, hidden, 1.0, 1)
    assert torch.equal(annotation.reward_N, annotation.frozen_reward_N)


def test_vanilla_takes_no_hidden_states(make_engine: EngineFactory, trajectories: Trajectories) -> None:
    engine = make_engine(omega_floor=1.0, update_steps=0)
    empty = states(trajectories.layout, seed=0, width=0)
    annotation = engine.annotate(trajectories, empty, 1.0, 1)
    assert torch.equal(annotation.reward_N, annotation.frozen_reward_N)
    assert engine.head.w_k.shape == (0, 16)


def test_annotation_repeats_and_leaves_hidden_states_alone(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    before = hidden.hidden_TP.clone()
    for noise in (0.0, 0.5):
        one = make_engine(noise=noise).annotate(trajectories, hidden, 0.6, 3)
        other = make_engine(noise=noise).annotate(trajectories, hidden, 0.6, 3)
        assert torch.equal(one.reward_N, other.reward_N)
        assert torch.equal(one.rte_ND, other.rte_ND)
    assert torch.equal(hidden.hidden_TP, before)


def test_bfloat16_hidden_states_are_read_as_their_float32_values(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    narrow = replace(hidden, hidden_TP=hidden.hidden_TP.bfloat16())
    wide = replace(hidden, hidden_TP=narrow.hidden_TP.float())
    engine = make_engine()
    rewards = [engine.annotate(trajectories, h, 0.6, 1).reward_N for h in (narrow, wide)]
    assert torch.equal(*rewards)


def test_reward_model_reads_text_with_its_own_vocabulary(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden
) -> None:
    annotation = make_engine().annotate(trajectories, hidden, 0.6, 1)
    # The reward model's 128 words end at w123: w140 and w141 are the same unknown word to it alone.
    assert float(annotation.frozen_reward_N[4]) == pytest.approx(
        float(annotation.frozen_reward_N[5]), abs=1e-6
    )
    assert annotation.response_id_N.tolist() == [0, 1, 0, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("width", [P - 1, 0])
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
    annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    weight_T = engine.attention(hidden, annotation)
    head = engine.head
    for n in range(hidden.layout.rows):
        h = hidden.hidden_TP[hidden.layout.slice_of(n)]
        query = annotation.rte_ND[n] @ head.w_q.detach()
        expected = torch.softmax(query @ (h @ head.w_k.detach()).T / 4, 0)
        torch.testing.assert_close(weight_T[hidden.layout.slice_of(n)], expected, atol=1e-5, rtol=0)


# Noise.


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
    one, other = (engine.annotate(trajectories, hidden, 0.6, step) for step in (1, 2))
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
    rewards = [engine.annotate(trajectories, h, 0.6, 1).reward_N for h in (hidden, shuffled)]
    torch.testing.assert_close(*rewards, atol=1e-5, rtol=0)


# Update.


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pair_source", list(PairSource))
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
    }[pair_source].view(-1, K)
    loss, _ = grebt(reward_GK, pairs, torch.arange(20).view(-1, K), entropy_weight=entropy_weight)
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
        [equation_3_and_4(engine.head, b.annotation.rte_ND, b.hidden, 0.6) for b in batches]
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
    equal = replace(batch, hidden=replace(batch.hidden, hidden_TP=torch.ones_like(batch.hidden.hidden_TP)))
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
    annotation = engine.annotate(trajectories, hidden, 0.6, 1)
    trunk_before = {name: value.clone() for name, value in engine.trunk.model.state_dict().items()}
    calls: list[object] = []
    engine.trunk.model.register_forward_pre_hook(lambda *args: calls.append(args))
    head_before = parameters(engine)
    hidden_before = hidden.hidden_TP.clone()
    engine.update([RewardBatch(hidden=hidden, annotation=annotation)], 0.6, 1)
    assert not calls
    assert all(
        torch.equal(value, trunk_before[name]) for name, value in engine.trunk.model.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in engine.trunk.model.parameters())
    assert all(not torch.equal(value, head_before[name]) for name, value in parameters(engine).items())
    assert torch.equal(hidden.hidden_TP, hidden_before)
    # The frozen reward stays the original model's, though φ has moved.
    again = engine.annotate(trajectories, hidden, 1.0, 2)
    assert torch.equal(again.frozen_reward_N, annotation.frozen_reward_N)
    assert not torch.equal(again.reward_N, again.frozen_reward_N)


def test_paper_learning_rate_moves_nearly_all_weights(make_engine: EngineFactory) -> None:
    # At the paper's 0.02, where a float32 step of 1e-6 is not lost.
    engine = make_engine(learning_rate=1e-6, init_std=0.02)
    before = parameters(engine)
    engine.update([random_batch(1)], 0.6, 1)
    after = parameters(engine)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in before])
    assert moved.double().mean() > 0.99


def test_frozen_head_is_a_matter_of_zero_steps(make_engine: EngineFactory) -> None:
    engine = make_engine(update_steps=0)
    before = engine.digest()
    assert engine.update([random_batch(1)], 0.6, 1) == {}
    assert engine.digest() == before


def test_without_feedback_only_the_scoring_head_moves(
    make_engine: EngineFactory, trajectories: Trajectories
) -> None:
    engine = make_engine(omega_floor=1.0)
    empty = states(trajectories.layout, seed=0, width=0)
    annotation = engine.annotate(trajectories, empty, 1.0, 1)
    before = parameters(engine)
    stats = engine.update([RewardBatch(hidden=empty, annotation=annotation)], 1.0, 1)
    moved = {name for name, value in parameters(engine).items() if not torch.equal(value, before[name])}
    assert moved == {"score_weight"}
    assert stats["feedback_ratio"] == 0.0


def test_several_update_steps_are_repeated_single_ones(make_engine: EngineFactory) -> None:
    twice, once = make_engine(update_steps=2), make_engine()
    stats = twice.update([random_batch(1)], 0.6, 1)
    first = once.update([random_batch(1)], 0.6, 1)
    once.update([random_batch(1)], 0.6, 1)
    assert twice.digest() == once.digest()
    assert stats == first


def test_update_does_not_depend_on_the_cut_into_shards(make_engine: EngineFactory) -> None:
    one, other = random_batch(1), random_batch(2)
    notes = (one.annotation, other.annotation)
    layout = Layout.from_lengths([*one.hidden.layout.lengths, *other.hidden.layout.lengths], K)
    joined = RewardBatch(
        hidden=Hidden(layout=layout, hidden_TP=torch.cat([one.hidden.hidden_TP, other.hidden.hidden_TP])),
        annotation=Annotation(
            layout=layout,
            reward_N=torch.cat([note.reward_N for note in notes]),
            frozen_reward_N=torch.cat([note.frozen_reward_N for note in notes]),
            rte_ND=torch.cat([note.rte_ND for note in notes]),
            response_id_N=torch.cat([note.response_id_N for note in notes]),
        ),
    )
    whole, cut = make_engine(), make_engine()
    whole_stats, cut_stats = whole.update([joined], 0.6, 1), cut.update([one, other], 0.6, 1)
    assert whole_stats == pytest.approx(cut_stats, abs=1e-5)
    for name, value in parameters(cut).items():
        torch.testing.assert_close(parameters(whole)[name], value, atol=1e-6, rtol=0)


def test_update_that_is_not_finite_is_skipped_and_counted(make_engine: EngineFactory) -> None:
    engine, clean = make_engine(update_steps=2), make_engine(update_steps=2)
    batch = random_batch(1)
    broken_TP = batch.hidden.hidden_TP.clone()
    broken_TP[3, 5] = float("nan")
    before = engine.digest()
    stats = engine.update([replace(batch, hidden=replace(batch.hidden, hidden_TP=broken_TP))], 0.6, 1)
    assert stats["skipped_steps"] == 2
    assert not math.isfinite(stats["gradient_norm"])
    assert engine.digest() == before
    assert engine.update([batch], 0.6, 2)["skipped_steps"] == 0
    clean.update([batch], 0.6, 2)
    assert engine.digest() == clean.digest()


def test_groups_that_teach_nothing_move_nothing_even_by_momentum(make_engine: EngineFactory) -> None:
    engine = make_engine()
    engine.update([random_batch(1)], 0.6, 1)
    before = engine.digest()
    batch = random_batch(2)
    layout = Layout.from_lengths([5] * 2 * K, K)
    tied = RewardBatch(
        hidden=Hidden(layout=layout, hidden_TP=states(layout, seed=0).hidden_TP[:5].repeat(2 * K, 1)),
        annotation=replace(
            batch.annotation,
            layout=layout,
            rte_ND=batch.annotation.rte_ND[:1].repeat(2 * K, 1),
            response_id_N=torch.zeros(2 * K, dtype=torch.int64),
        ),
    )
    stats = engine.update([tied], 0.6, 2)
    assert engine.digest() == before
    assert stats["skipped_steps"] == 1
    assert stats["valid_pairs"] == stats["loss"] == 0.0
    assert math.isnan(stats["margin"])


# State on disk.


def test_saved_head_loads_in_three_lines(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.update([random_batch(1)], 0.7, 1)
    annotation = engine.annotate(trajectories, hidden, 0.7, 2)
    engine.save(tmp_path)
    head, info = load_head(tmp_path / "reward_head")
    reward_N = head(annotation.rte_ND, hidden.hidden_TP, hidden.layout.offsets, info.omega)
    assert info.omega == 0.7
    assert torch.equal(reward_N, annotation.reward_N)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_resumed_updates_are_bit_identical(
    steps_before: int, make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine()
    for step in range(steps_before):
        engine.update([random_batch(step)], 0.7, step)
    engine.save(tmp_path / "now")
    # One fresh engine, one that has to forget what it did since.
    astray = make_engine()
    astray.update([random_batch(9)], 0.7, 9)
    resumed = [make_engine(), astray]
    for other in resumed:
        other.load(tmp_path / "now")
        assert other.digest() == engine.digest()
    for step in (5, 6):
        for each in (engine, *resumed):
            each.update([random_batch(step)], 0.6, step)
    engine.save(tmp_path / "later")
    for i, other in enumerate(resumed):
        other.save(tmp_path / f"resumed{i}")
        for file in sorted((tmp_path / "later" / "reward_head").iterdir()):
            assert (tmp_path / f"resumed{i}" / "reward_head" / file.name).read_bytes() == file.read_bytes()


def test_optimizer_state_matters_to_resume(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine, forgetful = make_engine(), make_engine()
    engine.update([random_batch(1)], 0.7, 1)
    forgetful.head.load_state_dict(engine.head.state_dict())
    for each in (engine, forgetful):
        each.update([random_batch(2)], 0.7, 2)
    assert engine.digest() != forgetful.digest()


def test_nothing_is_saved_but_safetensors_and_json(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine(omega_floor=1.0)
    engine.save(tmp_path)
    names = sorted(path.name for path in (tmp_path / "reward_head").iterdir())
    assert names == ["head.json", "head.safetensors", "optimizer.json", "optimizer.safetensors"]
    engine.load(tmp_path)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors", "optimizer.json", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "truncated"])
def test_damaged_files_are_refused_by_name(
    name: str, damage: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.update([random_batch(1)], 0.7, 1)
    engine.save(tmp_path)
    path = tmp_path / "reward_head" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    before = engine.digest()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        engine.load(tmp_path)
    assert engine.digest() == before


def test_head_of_another_size_is_refused(make_engine: EngineFactory, tmp_path: Path) -> None:
    make_engine(attention_width=8).save(tmp_path)
    with pytest.raises(InputError, match=r"attention_width=8.*attention_width=16"):
        make_engine().load(tmp_path)


def test_head_that_contradicts_its_description_is_refused(make_engine: EngineFactory, tmp_path: Path) -> None:
    make_engine().save(tmp_path)
    path = tmp_path / "reward_head" / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "policy_width": 32}))
    with pytest.raises(InputError, match=r"head.safetensors: w_k is \[64, 16\], not \[32, 16\]"):
        load_head(tmp_path / "reward_head")
    path.write_text(json.dumps({"omega": 1.0}))
    with pytest.raises(InputError, match=r"head.json must hold exactly the fields policy_width"):
        load_head(tmp_path / "reward_head")
