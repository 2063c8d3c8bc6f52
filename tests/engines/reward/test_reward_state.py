"""The head on disk: what is written, what it restores, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reward_rows import random_batch

from r2m_ray.core.batch import Hidden, Trajectories
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.reward.head_files import load_head
from r2m_ray.errors import InputError

EngineFactory = Callable[..., RewardEngine]


def test_saved_head_loads_in_three_lines(
    make_engine: EngineFactory, trajectories: Trajectories, hidden: Hidden, tmp_path: Path
) -> None:
    engine = make_engine()
    engine.update([random_batch(1)], 0.7, 1)
    _, annotation = engine.annotate(trajectories, hidden, 0.7, 2)
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
        assert other.digests() == engine.digests()
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
    assert engine.digests() != forgetful.digests()


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
    before = engine.digests()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        engine.load(tmp_path)
    assert engine.digests() == before


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
