"""The frozen reward model scores as transformers does, whatever the tokenizer, padding or batch."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, word_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPTNeoXForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2ForSequenceClassification,
)

from r2m_ray.engines.reward.trunk import RewardTrunk
from r2m_ray.errors import InputError

PROMPTS = ("w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w1", "w10 w11")
RESPONSES = ("w20 w21", "w22 w23 w24 w25 w26 w27 w28", "w29", "w30 w31 w32")
TEMPLATE = (
    "{% for m in messages %}{{ 'w100 ' if m.role == 'user' else 'w101 ' }}{{ m.content }} w102 {% endfor %}"
)
RESPONSE_ONLY = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
FAMILIES: dict[str, tuple[type[PreTrainedModel], dict[str, int]]] = {
    "llama": (LlamaForSequenceClassification, {"width": 32, "num_key_value_heads": 2}),
    "qwen2": (Qwen2ForSequenceClassification, {"width": 48, "num_key_value_heads": 4}),
    "gpt_neox": (GPTNeoXForSequenceClassification, {"width": 64}),
    "bert": (BertForSequenceClassification, {"width": 32}),
}


def reward_model(directory: Path, kind: type[PreTrainedModel], **fields: object) -> Path:
    """A model of one label whose configuration names no padding token."""
    options = {"heads": 4, "num_labels": 1, "pad_token_id": None} | fields
    return save_model(directory, kind, tokenizer=word_tokenizer(128), **options)  # type: ignore[arg-type]


def trunk_of(directory: Path, **changes: object) -> RewardTrunk:
    options: dict[str, object] = {
        "dtype": torch.float32,
        "attention": "sdpa",
        "score_layer": "score",
        "max_length": 256,
        "tokens_per_microbatch": 64,
        "device": torch.device("cpu"),
    }
    return RewardTrunk(model_dir=str(directory), **{**options, **changes})  # type: ignore[arg-type]


def direct_score(directory: Path, ids: list[int]) -> float:
    """transformers' own score of one row; without a padding id it scores the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def with_tokenizer(source: Path, target: Path, **fields: object) -> Path:
    """A copy of a model directory whose tokenizer has other fields; None deletes one."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    stored = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    return target


def with_config(source: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: reward_model(tmp_path_factory.mktemp(name), kind, seed=seed, **fields)
        for seed, (name, (kind, fields)) in enumerate(FAMILIES.items())
    }


@pytest.fixture(scope="module")
def scores(tiny_reward_dir: Path) -> Tensor:
    return trunk_of(tiny_reward_dir).read(PROMPTS, RESPONSES)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers_own(family: str, directories: dict[str, Path]) -> None:
    directory = directories[family]
    trunk = trunk_of(directory, score_layer="classifier" if family == "bert" else "score")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rte_ND, score_N = trunk.read(PROMPTS, RESPONSES)
    assert rte_ND.shape == (4, trunk.width)
    assert rte_ND.dtype == score_N.dtype == torch.float32
    for n, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = [*tokenizer(prompt).input_ids, *tokenizer(response).input_ids, tokenizer.eos_token_id]
        expected = direct_score(directory, ids)
        alone = trunk.read([prompt], [response])[1]
        assert float(alone[0]) == pytest.approx(expected, abs=1e-6)
        # Another batch composition takes other matrix kernels: a few float32 roundings.
        assert float(score_N[n]) == pytest.approx(expected, abs=1e-5)


def test_score_is_the_score_layer_of_the_embedding(tiny_reward_dir: Path) -> None:
    trunk = trunk_of(tiny_reward_dir)
    rte_ND, score_N = trunk.read(PROMPTS, RESPONSES)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)
    torch.testing.assert_close(rte_ND @ model.score.weight[0].detach(), score_N, atol=1e-6, rtol=0)


def test_repeats_bit_for_bit_and_any_batch_agrees(tiny_reward_dir: Path, scores: Tensor) -> None:
    assert torch.equal(trunk_of(tiny_reward_dir).read(PROMPTS, RESPONSES)[1], scores)
    for budget in (1, 17, 10_000):
        other = trunk_of(tiny_reward_dir, tokens_per_microbatch=budget).read(PROMPTS, RESPONSES)[1]
        torch.testing.assert_close(other, scores, atol=1e-5, rtol=0)
    backwards = trunk_of(tiny_reward_dir).read(PROMPTS[::-1], RESPONSES[::-1])[1]
    torch.testing.assert_close(backwards.flip(0), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [{"padding_side": "left"}, {"pad_token": "<eos>"}, {"pad_token": None}],
    ids=["left", "pad=eos", "no pad"],
)
def test_tokenizer_padding_does_not_matter(
    fields: dict[str, object], tiny_reward_dir: Path, tmp_path: Path, scores: Tensor
) -> None:
    directory = with_tokenizer(tiny_reward_dir, tmp_path / "rm", **fields)
    assert torch.equal(trunk_of(directory).read(PROMPTS, RESPONSES)[1], scores)


@pytest.mark.parametrize("padding_id", [2, None], ids=["pad=eos", "no pad"])
def test_model_padding_does_not_matter(
    padding_id: int | None, tiny_reward_dir: Path, tmp_path: Path, scores: Tensor
) -> None:
    directory = with_config(tiny_reward_dir, tmp_path / "rm", pad_token_id=padding_id)
    before = (directory / "config.json").read_bytes()
    assert torch.equal(trunk_of(directory).read(PROMPTS, RESPONSES)[1], scores)
    assert (directory / "config.json").read_bytes() == before


def test_end_token_as_padding_is_announced(
    tiny_reward_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="r2m_ray.engines.reward.trunk"):
        trunk_of(tiny_reward_dir)
        assert not caplog.records
        trunk_of(with_config(tiny_reward_dir, tmp_path / "rm", pad_token_id=2))
    assert "padding token (id 2)" in caplog.text


def test_chat_template_renders_the_conversation(tiny_reward_dir: Path, tmp_path: Path) -> None:
    directory = with_tokenizer(tiny_reward_dir, tmp_path / "rm", chat_template=TEMPLATE)
    score = trunk_of(directory).read(["w1 w2"], ["w3"])[1]
    ids = AutoTokenizer.from_pretrained(directory)("w100 w1 w2 w102 w101 w3 w102").input_ids
    assert float(score[0]) == pytest.approx(direct_score(directory, ids), abs=1e-6)


def test_response_only_template_hides_the_prompt(
    tiny_reward_dir: Path, tmp_path: Path, scores: Tensor
) -> None:
    trunk = trunk_of(with_tokenizer(tiny_reward_dir, tmp_path / "rm", chat_template=RESPONSE_ONLY))
    one, other = trunk.read(["w1", "w2 w3 w4"], ["w20 w21", "w20 w21"])[1]
    assert float(one) == pytest.approx(float(other), abs=1e-6)
    assert abs(one - scores[0]) > 1e-3


def test_long_conversation_is_refused_with_sizes(tiny_reward_dir: Path) -> None:
    trunk = trunk_of(tiny_reward_dir, max_length=300)
    trunk.read(["w1 " * 200], ["w2 " * 55])
    with pytest.raises(InputError, match=r"row 1 has 257 tokens.*max_position_embeddings.*is 256"):
        trunk.read(["w1", "w1 " * 200], ["w2", "w2 " * 56])
    with pytest.raises(InputError, match=r"row 0 has 9 tokens, and reward.max_length is 8"):
        trunk_of(tiny_reward_dir, max_length=8).read(["w1 w2 w3 w4"], ["w5 w6 w7 w8"])


def test_empty_conversation_is_refused(tiny_reward_dir: Path, tmp_path: Path) -> None:
    trunk = trunk_of(with_tokenizer(tiny_reward_dir, tmp_path / "rm", chat_template=RESPONSE_ONLY))
    with pytest.raises(InputError, match="row 0 has no tokens"):
        trunk.read(["w1"], [""])


def test_several_labels_are_refused(tiny_reward_dir: Path, tmp_path: Path) -> None:
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    with pytest.raises(InputError, match=r"num_labels \(id2label\) in config.json is 2"):
        trunk_of(with_config(tiny_reward_dir, tmp_path / "rm", **labels))


def test_missing_score_layer_lists_candidates(directories: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"'score'.*model.score_layer to one of: classifier"):
        trunk_of(directories["bert"])


def test_layer_that_does_not_make_the_score_is_refused(tmp_path: Path) -> None:
    reward_model(tmp_path, LlamaForSequenceClassification, width=32, intermediate_size=1)
    trunk_of(tmp_path)
    with pytest.raises(InputError, match=r"model.score_layer at the last token gives .* own logit is"):
        trunk_of(tmp_path, score_layer="model.layers.1.mlp.up_proj")


def test_causal_language_model_is_refused(tmp_path: Path) -> None:
    reward_model(tmp_path, LlamaForCausalLM, width=32)
    with pytest.raises(InputError, match=r"lack score.weight"):
        trunk_of(tmp_path)


def test_nan_weights_are_refused(tiny_reward_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    directory = tmp_path / "rm"
    shutil.copytree(tiny_reward_dir, directory)
    model.save_pretrained(directory)
    with pytest.raises(InputError, match="NaN or infinity"):
        trunk_of(directory)


def test_pickled_weights_are_refused(tiny_reward_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "rm"
    shutil.copytree(tiny_reward_dir, directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model.reward=.*safetensors"):
        trunk_of(directory)


def test_larger_vocabulary_than_the_embedding_is_refused(
    tiny_reward_dir: Path, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "rm"
    shutil.copytree(tiny_reward_dir, directory)
    AutoTokenizer.from_pretrained(tiny_policy_dir).save_pretrained(directory)
    with pytest.raises(InputError, match="tokenizer has 160 tokens and its embedding 128"):
        trunk_of(directory)


def test_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.reward=.*nowhere cannot be loaded"):
        trunk_of(tmp_path / "nowhere")


def test_bfloat16_trunk_gives_float32_scores_near_the_float32_model(
    tiny_reward_dir: Path, scores: Tensor
) -> None:
    narrow = trunk_of(tiny_reward_dir, dtype=torch.bfloat16).read(PROMPTS, RESPONSES)[1]
    assert narrow.dtype == torch.float32
    # Two layers of bfloat16 (2^-8 each) under weights of deviation 0.3.
    torch.testing.assert_close(narrow, scores, atol=0.25, rtol=0.1)
