"""How fast a head is fitted best: the fit is the engine's own, and is judged on pairs that it never saw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.overoptimization import rates as rates_module
from benchmarks.overoptimization.additions import Additions
from benchmarks.overoptimization.rates import Pairs, fitted, main, read, without_h
from benchmarks.overoptimization.worlds import Recipe
from r2m_ray.config.schema import Config
from r2m_ray.tasks.note2answer.samples import preference_pairs
from r2m_ray.tasks.prepare.measurement import reward_accuracy
from r2m_ray.tasks.prepare.store import Prepared


@pytest.fixture
def config(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Pairs of little gold against much, so that there is something to learn in 64 of them."""
    monkeypatch.setattr(rates_module, "MARKS", (32, 64))
    monkeypatch.setattr(rates_module, "JUDGED_BY", 48)
    tiny_config.algo.prompts_per_step = 8
    tiny_config.prepare.pair_rows = 80
    tiny_config.task.max_new_tokens = 48
    tiny_config.reward.omega_floor = 0.6
    return tiny_config


@pytest.fixture
def pairs(config: Config, tiny_prepared: Prepared) -> Pairs:
    return read(config, tiny_prepared)


def test_pairs_are_the_worlds_and_h_is_the_policys(config: Config, pairs: Pairs) -> None:
    assert (len(pairs.training), len(pairs.held_out)) == (8, 6)
    batch = pairs.training[0]
    assert batch.annotation.layout.groups == 8
    assert batch.hidden.hidden_TP.shape == (batch.annotation.layout.tokens, 32)
    assert without_h(pairs).training[0].hidden.hidden_TP.shape == (batch.annotation.layout.tokens, 0)
    assert torch.equal(without_h(pairs).held_out[3].annotation.rte_ND, pairs.held_out[3].annotation.rte_ND)


def test_a_head_without_h_starts_as_the_frozen_model_and_moves(
    config: Config, tiny_prepared: Prepared, pairs: Pairs
) -> None:
    config.reward.omega_floor = 1.0
    config.reward.warmup_learning_rate = 3e-2
    found = fitted(config, tiny_prepared, without_h(pairs))
    held_out = preference_pairs(config, "rates", 48)
    assert found[0] == reward_accuracy(config, tiny_prepared.reward_dir, held_out)
    assert len(found) == 3
    assert found[2] != found[0]
    assert fitted(config, tiny_prepared, without_h(pairs)) == found


def test_a_head_that_is_shown_the_same_pairs_again_learns_them(
    config: Config, tiny_prepared: Prepared, pairs: Pairs
) -> None:
    config.reward.warmup_learning_rate = 3e-2
    (batch, *_) = pairs.held_out
    before, *_, after = fitted(config, tiny_prepared, Pairs(training=[batch] * 8, held_out=[batch]))
    assert before < after == 1.0


def test_the_command_writes_every_rate_of_both_heads(
    config: Config, tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def composed(words: tuple[str, ...]) -> Recipe:
        chosen = replace(config, reward=replace(config.reward))
        rate = next((word for word in words if "warmup_learning_rate" in word), "=0.01")
        chosen.reward.warmup_learning_rate = float(rate.partition("=")[2])
        chosen.reward.omega_floor = 1.0 if "reward=refit" in words else 0.6
        return Recipe(config=chosen, additions=Additions())

    monkeypatch.setattr(rates_module, "recipe", composed)
    monkeypatch.setattr(rates_module, "prepare", lambda _: tiny_prepared)
    monkeypatch.setattr(rates_module, "RATES", (1e-3, 1e-2))
    out = tmp_path / "rates.json"
    monkeypatch.setattr("sys.argv", ["rates", "--seeds", "5", "--out", str(out)])
    main()
    written = json.loads(out.read_text())
    assert written["pairs"] == [0, 32, 64]
    assert {head: set(found) for head, found in written["seeds"]["5"].items()} == {
        "static_h": {"0.001", "0.01"},
        "refit": {"0.001", "0.01"},
    }
