"""The reference scores like transformers does, one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_rows import trajectories
from transformers import LlamaForCausalLM

from r2m_ray.config.schema import AlgoConfig, Config, Dtype, KLEstimator, ModelConfig, ReferenceConfig
from r2m_ray.core.policy_loss import kl_penalty
from r2m_ray.engines.policy.reference import ReferencePolicy
from r2m_ray.errors import InputError

CPU = torch.device("cpu")


def config(budget: int) -> Config:
    return Config(algo=AlgoConfig(temperature=0.6), reference=ReferenceConfig(tokens_per_microbatch=budget))


@pytest.mark.parametrize("budget", [1, 50, 10_000])
@torch.no_grad()
def test_equals_transformers_row_by_row(budget: int, tiny_policy_dir: Path) -> None:
    rows = trajectories(2)
    reference = ReferencePolicy(config=config(budget), model_dir=str(tiny_policy_dir), device=CPU)
    _, found = reference.logprobs(rows)
    model = LlamaForCausalLM.from_pretrained(tiny_policy_dir)
    for n in range(rows.layout.rows):
        part = rows.layout.slice_of(n)
        logits = model(rows.input_T[part][None]).logits[0]
        label, action_T = rows.label_T[part][:, None], rows.action_T[part]
        for logp_T, temperature in ((found.tempered_T, 0.6), (found.unit_T, 1.0)):
            expected = torch.log_softmax(logits / temperature, -1).gather(-1, label)[:, 0]
            torch.testing.assert_close(logp_T[part][action_T], expected[action_T], atol=1e-5, rtol=1e-5)
            assert not logp_T[part][~action_T].any()


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_kl_of_each_row_is_summed_over_its_response_as_sampled(
    estimator: KLEstimator, tiny_policy_dir: Path
) -> None:
    rows, settings = trajectories(5), config(50)
    settings.algo.kl_estimator = estimator
    kl, logp = ReferencePolicy(config=settings, model_dir=str(tiny_policy_dir), device=CPU).logprobs(rows)
    found = {"k1": kl.sampled_N, estimator.value: kl.penalty_N}
    for name, row_N in found.items():
        penalty_T = kl_penalty(rows.rollout_logp_T, logp.tempered_T, name).double()
        for n in range(rows.layout.rows):
            part = rows.layout.slice_of(n)
            expected = float(penalty_T[part][rows.action_T[part]].sum())
            assert float(row_N[n]) == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def test_never_changes(tiny_policy_dir: Path) -> None:
    reference = ReferencePolicy(config=config(50), model_dir=str(tiny_policy_dir), device=CPU)
    first, again = (reference.logprobs(trajectories(3))[1] for _ in range(2))
    assert torch.equal(first.tempered_T, again.tempered_T)
    assert not first.tempered_T.requires_grad


def test_bfloat16_agrees_to_its_precision(tiny_policy_dir: Path) -> None:
    rows = trajectories(4)
    half = config(50)
    half.model = ModelConfig(dtype=Dtype.bfloat16)
    exact, found = (
        ReferencePolicy(config=each, model_dir=str(tiny_policy_dir), device=CPU).logprobs(rows)[1]
        for each in (config(50), half)
    )
    assert found.unit_T.dtype == torch.float32
    # Logits reach ±10 here, where neighbouring bfloat16 numbers are 1/16 apart.
    assert 0 < (found.unit_T - exact.unit_T).abs().max() < 0.5


def test_a_bad_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.reference=.*cannot be loaded"):
        ReferencePolicy(config=config(50), model_dir=str(tmp_path), device=CPU)
