"""The packed policy agrees with transformers, row by row, in either layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_rows import trajectories
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from r2m_ray.core.batch import Trajectories
from r2m_ray.engines.policy import causal
from r2m_ray.engines.policy.blocks import Rows, blocks, grids, idle_block
from r2m_ray.engines.policy.causal import CausalScorer, label_logprobs, load_causal
from r2m_ray.errors import InputError

CPU = torch.device("cpu")
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def neox_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX: fused queries, parallel residual, partly rotated positions, another name for its head."""
    torch.manual_seed(5)
    config = GPTNeoXConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    directory = tmp_path_factory.mktemp("neox")
    GPTNeoXForCausalLM(config).save_pretrained(directory)
    return directory


def load(directory: Path) -> PreTrainedModel:
    return load_causal(
        str(directory), field="model.policy", dtype=torch.float32, attention="sdpa", device=CPU
    )


def scorer_of(directory: Path, temperature: float) -> CausalScorer:
    return CausalScorer(load(directory), attention="sdpa", temperature=temperature, token_budget=64)


def score(
    scorer: CausalScorer, records: list[Trajectories], *, budget: int, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, P] and both log-probs [T] of all rows, in `budget` tokens a pass."""
    rows = Rows.of(records)
    hidden_TP = torch.full((rows.input_T.numel(), scorer.width), torch.nan)
    logp_T, unit_T = torch.zeros(rows.input_T.numel()), torch.zeros(rows.input_T.numel())
    for block in blocks(rows, token_budget=budget, packed=packed, device=CPU):
        hidden_SP, logp_A, unit_A = scorer(block.input_BL, block.position_BL, block.pick_A, block.label_A)
        hidden_TP[block.token_T] = hidden_SP[block.slot_T]
        logp_T = logp_T.index_put((block.action_A,), logp_A)
        unit_T[block.action_A] = unit_A
    return hidden_TP, logp_T, unit_T


def row_by_row(model: PreTrainedModel, records: list[Trajectories]) -> tuple[Tensor, Tensor, Tensor]:
    """The same from transformers' own forward pass over one unpadded row at a time."""
    hidden, logp, unit = [], [], []
    for record in records:
        for row in range(record.layout.rows):
            part = record.layout.slice_of(row)
            output = model(input_ids=record.input_T[part][None], output_hidden_states=True)
            label_T = record.label_T[part][:, None]
            action_T = record.action_T[part]
            hidden.append(output.hidden_states[-1][0].detach())
            for temperature, found in ((TEMPERATURE, logp), (1.0, unit)):
                logp_T = torch.log_softmax(output.logits[0] / temperature, -1).gather(-1, label_T)[:, 0]
                found.append(torch.where(action_T, logp_T, 0))
    return torch.cat(hidden), torch.cat(logp), torch.cat(unit).detach()


@pytest.mark.parametrize("packed", [False, True], ids=["grid", "line"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("model_dir", ["tiny_policy_dir", "tied_policy_dir", "neox_dir"])
def test_packed_rows_equal_rows_alone(
    model_dir: str, budget: int, packed: bool, request: pytest.FixtureRequest
) -> None:
    records = [trajectories(0), trajectories(1)]
    scorer = scorer_of(request.getfixturevalue(model_dir), TEMPERATURE)
    weight_T = torch.randn(records[0].layout.tokens + records[1].layout.tokens)

    expected_hidden, expected, expected_unit = row_by_row(scorer.model, records)
    (expected * weight_T).sum().backward()
    gradients = {name: p.grad.clone() for name, p in scorer.model.named_parameters()}
    scorer.zero_grad()
    hidden_TP, logp_T, unit_T = score(scorer, records, budget=budget, packed=packed)
    (logp_T * weight_T).sum().backward()

    torch.testing.assert_close(hidden_TP, expected_hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp_T, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unit_T, expected_unit, atol=1e-5, rtol=1e-5)
    for name, parameter in scorer.model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, name


def test_rows_on_a_line_leak_with_a_cache_and_not_without(tiny_policy_dir: Path) -> None:
    """Why `use_cache=False` stands in the forward pass: transformers' default lets rows read each other."""
    scorer = scorer_of(tiny_policy_dir, 1.0)
    records = [trajectories(0)]
    (block,) = blocks(Rows.of(records), token_budget=10_000, packed=True, device=CPU)
    with torch.no_grad():
        alone, _, _ = row_by_row(scorer.model, records)
        isolated, _, _ = score(scorer, records, budget=10_000, packed=True)
        cached = scorer.model.base_model(
            input_ids=block.input_BL, position_ids=block.position_BL, use_cache=True
        ).last_hidden_state[0]
    assert (isolated - alone).abs().max() < 1e-5
    assert (cached - alone).abs().max() > 0.1


def test_scoring_in_chunks_changes_nothing(tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [trajectories(0)]
    found = []
    for chunks in (1, 50):
        monkeypatch.setattr(causal, "LOGITS_AT_ONCE", 64 * 160 // chunks)
        scorer = scorer_of(tiny_policy_dir, TEMPERATURE)
        _, logp_T, unit_T = score(scorer, records, budget=10_000, packed=False)
        logp_T.sum().backward()
        found.append((logp_T.detach(), unit_T, scorer.model.lm_head.weight.grad.clone()))
    for chunked, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_label_logprobs_by_hand() -> None:
    logits_AV = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    tempered, unit = label_logprobs(logits_AV, torch.tensor([2]), 0.5)
    # 2/0.5 − log(e⁰ + e² + e⁴) and 2 − log(e⁰ + e¹ + e²).
    assert tempered.item() == pytest.approx(-0.142932, abs=1e-6)
    assert unit.item() == pytest.approx(-0.407606, abs=1e-6)
    assert tempered.requires_grad
    assert not unit.requires_grad


def test_dropout_is_off_in_training(tmp_path: Path, tiny_policy_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_policy_dir)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    ids = torch.arange(4, 20)[None]
    careless = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert not torch.equal(careless(ids).logits, careless(ids).logits)
    loaded = load(tmp_path).train()
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)


def test_an_idle_block_reaches_every_parameter(tied_policy_dir: Path) -> None:
    scorer = scorer_of(tied_policy_dir, 1.0)
    block = idle_block(CPU)
    hidden_SP, logp_A, _ = scorer(block.input_BL, block.position_BL, block.pick_A, block.label_A)
    (0 * logp_A.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())
    assert hidden_SP[block.slot_T].shape == (0, 48)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_grids_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = grids(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert padded <= budget or len(batch) == 1


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=8, **SMALL)), "final_logit_softcapping=30.0"),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL)), "logit_scale=0.0625"),
    ],
)
def test_transformed_logits_are_refused(
    model: Callable[[], PreTrainedModel], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"model.policy=.*{field} in config.json"):
        load(tmp_path)
    monkeypatch.setattr(causal, "TRANSFORMED_LOGITS", ())
    with pytest.raises(InputError, match="its logits differ by"):
        load(tmp_path)


def test_unusable_weights_are_refused(tmp_path: Path, tiny_policy_dir: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_policy_dir).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan}, file, {"format": "pt"}
    )
    with pytest.raises(InputError, match="not finite"):
        load(tmp_path)
    save_file({n: w for n, w in weights.items() if n != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lack lm_head.weight"):
        load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"model.policy=.*nowhere cannot be loaded"):
        load(tmp_path / "nowhere")
