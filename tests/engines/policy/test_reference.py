"""The reference scores like transformers does, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from r2m_ray.config.schema import AlgoConfig, Config, Dtype, ModelConfig, ReferenceConfig
from r2m_ray.core.batch import Trajectories
from r2m_ray.engines.policy.reference import ReferencePolicy
from r2m_ray.errors import InputError

CPU = torch.device("cpu")


def config(budget: int) -> Config:
    return Config(algo=AlgoConfig(temperature=0.6), reference=ReferenceConfig(tokens_per_microbatch=budget))


@pytest.mark.parametrize("budget", [1, 50, 10_000])
@torch.no_grad()
def test_equals_transformers_row_by_row(
    budget: int, tiny_policy_dir: Path, make_trajectories: Callable[[int], Trajectories]
) -> None:
    rows = make_trajectories(2)
    found = ReferencePolicy(config=config(budget), model_dir=str(tiny_policy_dir), device=CPU).logprobs(rows)
    model = LlamaForCausalLM.from_pretrained(tiny_policy_dir)
    for n in range(rows.layout.rows):
        part = rows.layout.slice_of(n)
        logits = model(rows.input_T[part][None]).logits[0]
        label, action_T = rows.label_T[part][:, None], rows.action_T[part]
        for logp_T, temperature in ((found.tempered_T, 0.6), (found.unit_T, 1.0)):
            expected = torch.log_softmax(logits / temperature, -1).gather(-1, label)[:, 0]
            torch.testing.assert_close(logp_T[part][action_T], expected[action_T], atol=1e-5, rtol=1e-5)
            assert not logp_T[part][~action_T].any()


def test_never_changes(tiny_policy_dir: Path, make_trajectories: Callable[[int], Trajectories]) -> None:
    reference = ReferencePolicy(config=config(50), model_dir=str(tiny_policy_dir), device=CPU)
    first, again = (reference.logprobs(make_trajectories(3)) for _ in range(2))
    assert torch.equal(first.tempered_T, again.tempered_T)
    assert not first.tempered_T.requires_grad


def test_bfloat16_agrees_to_its_precision(
    tiny_policy_dir: Path, make_trajectories: Callable[[int], Trajectories]
) -> None:
    rows = make_trajectories(4)
    half = config(50)
    half.model = ModelConfig(dtype=Dtype.bfloat16)
    exact = ReferencePolicy(config=config(50), model_dir=str(tiny_policy_dir), device=CPU).logprobs(rows)
    found = ReferencePolicy(config=half, model_dir=str(tiny_policy_dir), device=CPU).logprobs(rows)
    assert found.unit_T.dtype == torch.float32
    # Logits reach ±10 here, where neighbouring bfloat16 numbers are 1/16 apart.
    assert 0 < (found.unit_T - exact.unit_T).abs().max() < 0.5


def test_a_bad_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.reference=.*cannot be loaded"):
        ReferencePolicy(config=config(50), model_dir=str(tmp_path), device=CPU)
