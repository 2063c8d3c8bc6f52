"""Damaged or hostile model directories: file and tensor are named, and the code in them never runs."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from r2m_ray.cli.checks.preflight import model_problems
from r2m_ray.config.schema import Config, TaskName
from r2m_ray.engines import model_files
from r2m_ray.engines.model_files import ModelFiles, chat_problems, open_model
from r2m_ray.engines.policy.causal import load_causal
from r2m_ray.engines.reward.trunk import RewardTrunk
from r2m_ray.errors import InputError

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture
def policy(tmp_path: Path, tiny_policy_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_policy_dir, tmp_path / "policy"))


@pytest.fixture
def reward(tmp_path: Path, tiny_reward_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_reward_dir, tmp_path / "reward"))


def problems(directory: Path) -> list[str]:
    opened = open_model("model.policy", directory)
    assert isinstance(opened, ModelFiles)
    return [str(problem) for problem in opened.problems()]


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_reported_by_file_and_tensor(
    dtype: torch.dtype, value: float, policy: Path
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(policy / WEIGHTS).items()}
    save_file(weights, policy / WEIGHTS)
    assert problems(policy) == []
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, policy / WEIGHTS)
    (text,) = problems(policy)
    assert text.startswith(
        f"model.policy: {policy / WEIGHTS}: model.layers.1.mlp.up_proj.weight holds NaN or"
    )


def test_numbers_at_the_end_of_a_type_are_finite(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        limits = torch.finfo(dtype)
        save_file(
            {"w": torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0], dtype=dtype)},
            tmp_path / "w.safetensors",
        )
        assert model_files.nonfinite_tensor(tmp_path / "w.safetensors") is None


def test_a_nan_is_found_in_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "CHUNK_NUMBERS", 16)
    for place in (0, 15, 16, 99):
        tensor = torch.zeros(100)
        tensor[place] = float("nan")
        file = tmp_path / f"{place}.safetensors"
        save_file({"a": torch.zeros(7), "b": tensor}, file)
        assert model_files.nonfinite_tensor(file) == "b"


def test_large_models_are_left_to_the_first_step(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(policy / WEIGHTS)
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, policy / WEIGHTS)
    assert len(problems(policy)) == 1
    monkeypatch.setattr(model_files, "SCANNED_BYTES", 1000)
    assert problems(policy) == []


def header(tensors: object, body: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(start: int, end: int, shape: object = (1,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "empty": b"",
    "header longer than the file": (2**63).to_bytes(8, "little"),
    "deep nesting": header(b"[" * 100_000),
    "fewer bytes than the shape has": header({"a": entry(0, 4, [2])}, b"abcd"),
    "a shape of words": header({"a": entry(0, 4, ["x"])}, b"abcd"),
    "a shape that overflows": header({"a": entry(0, 4, [2**40, 2**40])}, b"abcd"),
    "an unknown type": header({"a": entry(0, 4, dtype="X9")}, b"abcd"),
    "an end before its start": header({"a": entry(4, 0)}, b"abcd"),
    "two tensors in one place": header({"a": entry(0, 4), "b": entry(0, 4)}, b"abcd"),
    "bytes of no tensor": header({"a": entry(0, 4)}, b"abcdefgh"),
    "cut off": header({"a": entry(0, 8, [2])}, b"abcd"),
    "an endless name": header({"a" * 10**6: entry(4, 0)}, b"abcd"),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_weight_file_whose_header_is_wrong_is_refused(content: bytes, policy: Path) -> None:
    (policy / WEIGHTS).write_bytes(content)
    (text,) = problems(policy)
    assert text.startswith(f"model.policy: {policy / WEIGHTS}: not a complete safetensors file (")
    assert len(text) < 1000


def test_a_header_of_gigabytes_is_not_read(policy: Path) -> None:
    with (policy / WEIGHTS).open("wb") as sparse:
        sparse.write((2**31).to_bytes(8, "little"))
        sparse.truncate(2**31 + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (text,) = problems(policy)
    assert "not a complete safetensors file" in text
    # KiB: far below the two GiB that the header claims.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_a_shard_outside_the_directory_is_refused(policy: Path, reward: Path) -> None:
    (policy / WEIGHTS).rename(policy / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors", "b": "../reward/model.safetensors"}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))
    (text,) = problems(policy)
    assert "lies outside the model directory" in text


# Tokenizer


def test_token_ids_beyond_the_stored_embedding_are_reported_whatever_the_configuration_says(
    policy: Path,
) -> None:
    weights = load_file(policy / WEIGHTS)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, policy / WEIGHTS)
    (text,) = problems(policy)
    assert (
        "tokenizer.json: has ids up to 159, but model.embed_tokens.weight in model.safetensors has 100"
        in text
    )


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"vocab": {"a": "b"}}},
        {"model": {"vocab": 7}},
        {"model": {}, "added_tokens": [{}]},
        {"model": []},
    ],
)
def test_a_tokenizer_of_the_wrong_types_is_refused(content: object, policy: Path) -> None:
    (policy / "tokenizer.json").write_text(json.dumps(content))
    (text,) = problems(policy)
    assert "tokenizer.json: not a tokenizer" in text


def test_a_model_without_chat_template_is_legal_and_a_mixture_is_a_warning(
    policy: Path, reward: Path
) -> None:
    def found() -> list[str]:
        one, other = open_model("model.policy", policy), open_model("model.reward", reward)
        assert isinstance(one, ModelFiles)
        assert isinstance(other, ModelFiles)
        mixture = list(chat_problems(one, other))
        assert all(problem.warning for problem in mixture)
        return [problem.path for problem in mixture]

    assert found() == []
    (reward / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert found() == ["model.policy"]
    edit(policy / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert found() == []
    (reward / "chat_template.jinja").unlink()
    assert found() == ["model.reward"]


# Code that comes with a model

OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class OwnConfig: ...
class OwnModel: ...
class OwnTokenizer: ...
"""
AUTO_MAP = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoModelForSequenceClassification": "own.OwnModel",
}


def with_own_code(directory: Path, model_type: str) -> Path:
    (directory / "own.py").write_text(OWN_CODE)
    edit(directory / "config.json", auto_map=AUTO_MAP, model_type=model_type)
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    return directory


def load_policy(directory: Path) -> None:
    load_causal(str(directory), field="model.policy", dtype=torch.float32, attention="sdpa", device=CPU)


def load_reference(directory: Path) -> None:
    from r2m_ray.engines.policy.reference import ReferencePolicy

    ReferencePolicy(config=Config(), model_dir=str(directory), device=CPU)


def load_reward(directory: Path) -> None:
    RewardTrunk(
        model_dir=str(directory),
        dtype=torch.float32,
        attention="sdpa",
        score_layer="score",
        max_length=64,
        tokens_per_microbatch=64,
        device=CPU,
    )


def load_tokenizer(directory: Path) -> None:
    AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


LOADERS: list[tuple[str, Callable[[Path], None]]] = [
    ("policy", load_policy),
    ("policy", load_reference),
    ("reward", load_reward),
    ("policy", load_tokenizer),
]


@pytest.mark.parametrize(("role", "load"), LOADERS)
def test_a_known_model_loads_without_the_code_beside_it(
    role: str, load: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    directory = with_own_code(request.getfixturevalue(role), "llama")
    load(directory)
    assert not (directory / "ran").exists()


@pytest.mark.parametrize(("role", "load"), LOADERS[:3])
def test_a_model_that_needs_its_own_code_is_refused_by_every_role(
    role: str, load: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    directory = with_own_code(request.getfixturevalue(role), "own")
    with pytest.raises(InputError, match=str(directory)):
        load(directory)
    assert not (directory / "ran").exists()


def test_it_is_refused_before_any_engine_starts(policy: Path, reward: Path) -> None:
    config = Config()
    config.model.policy, config.model.reward = str(policy), str(reward)
    config.task.name = TaskName.note2answer
    assert model_problems(config) == []
    for directory in (policy, reward):
        with_own_code(directory, "own")
    found = {problem.path: str(problem) for problem in model_problems(config)}
    assert set(found) == {"model.policy", "model.reward"}
    assert all("needs code of its own (auto_map), which is never run" in text for text in found.values())
    assert not (policy / "ran").exists()
    assert not (reward / "ran").exists()
