"""Which tests start an engine, and tiny real models that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from models import save_model, word_tokenizer
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent
ENGINE_ROOMS = {"cluster", "e2e", "faults", "runtime"}
ENGINE_FIXTURES = {"local_cluster", "make_engine", "one_rank", "prepared", "start_engine"}
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # Before the selection by -m reads the markers.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``engine`` what starts Ray, vLLM or DeepSpeed or trains models, by its room or its fixtures."""
    for item in items:
        room = item.path.relative_to(TESTS).parts[0]
        fixtures = ENGINE_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if room in ENGINE_ROOMS or fixtures or item.get_closest_marker("e2e"):
            item.add_marker("engine")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64 (grouped-query attention, untied head) with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("policy"), num_key_value_heads=1)


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-label Llama reward model with another width and vocabulary than the policy."""
    return save_model(
        tmp_path_factory.mktemp("reward"),
        LlamaForSequenceClassification,
        seed=1,
        tokenizer=word_tokenizer(128),
        width=48,
        heads=4,
        num_labels=1,
    )


@pytest.fixture(scope="module")
def few_measures() -> Iterator[None]:
    """No test asks whether a tiny prepared model is good, and asking takes most of its preparation."""
    from r2m_ray.tasks.prepare import materials, measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "GOLD_PROMPTS", 64)
        patch.setattr(materials, "HELD_OUT_PAIRS", 64)
        yield


@pytest.fixture(scope="session")
def alpaca_eval() -> Path:
    """Real preference files, where the machine has them."""
    directory = SHARED_DATA / "alpaca_eval"
    if not directory.is_dir():
        pytest.skip(f"no preference data at {directory}")
    return directory
