"""What is not finite changes no weight of the learner, is counted, and is neither saved nor sent."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_rows import BATCHES, IDS, assert_equal, learner, learner_config, weights
from transformers import AutoModelForCausalLM

from r2m_ray.config.schema import (
    Config,
    KLEstimator,
)
from r2m_ray.core.batch import PolicyBatch, ReferenceLogprobs
from r2m_ray.errors import RunError

pytestmark = pytest.mark.usefixtures("one_rank")


def broken(batch: PolicyBatch, estimator: KLEstimator) -> PolicyBatch:
    """NaN in the advantages; or in the reference, which k1 keeps out of the gradient."""
    if estimator is KLEstimator.k3:
        return replace(batch, advantage_N=batch.advantage_N * torch.nan)
    nan_T = batch.reference.tempered_T * torch.nan
    return replace(batch, reference=ReferenceLogprobs(tempered_T=nan_T, unit_T=batch.reference.unit_T))


@pytest.mark.parametrize("estimator", [KLEstimator.k3, KLEstimator.k1])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_non_finite_steps_are_skipped(stage: int, estimator: KLEstimator, tiny_policy_dir: Path) -> None:
    config = learner_config(stage)
    config.algo.kl_estimator = estimator
    policy = learner(config, tiny_policy_dir)
    before = weights(policy)
    stats, _ = policy.update([broken(BATCHES[0], estimator), BATCHES[1]], IDS[:2])
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (0, 2)
    assert_equal(weights(policy), before)

    stats, _ = policy.update([*BATCHES[:2], broken(BATCHES[2], estimator)], IDS)
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (2, 2)
    untroubled = learner(config, tiny_policy_dir)
    expected, _ = untroubled.update(BATCHES[:2], IDS[:2])
    assert_equal(weights(policy), weights(untroubled))
    assert stats["loss"] == expected["loss"]
    assert stats["grad_norm"] == expected["grad_norm"]


def with_value(batch: PolicyBatch, what: str, value: float) -> PolicyBatch:
    """One value of the first row's last response token, or of its reward's advantage."""
    rows = batch.trajectories
    last = int(rows.layout.offsets[1]) - 1
    if what == "advantage":
        advantage_N = batch.advantage_N.clone()
        advantage_N[0] = value
        return replace(batch, advantage_N=advantage_N)
    if what == "rollout":
        logp_T = rows.rollout_logp_T.clone()
        logp_T[last] = value
        return replace(batch, trajectories=replace(rows, rollout_logp_T=logp_T))
    base_T = batch.reference.tempered_T.clone()
    base_T[last] = value
    return replace(batch, reference=ReferenceLogprobs(tempered_T=base_T, unit_T=0.9 * base_T))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["advantage", "rollout", "reference"])
@pytest.mark.parametrize("weight", [0.04, 0.0])
def test_one_broken_number_skips_its_steps_and_spoils_no_statistic(
    weight: float, what: str, value: float, config: Config, tiny_policy_dir: Path
) -> None:
    """Also where the loss does not read it: the rollout's log-probs, and the reference's at β = 0."""
    config.algo.kl_weight = weight
    policy = learner(config, tiny_policy_dir)
    stats, _ = policy.update([*BATCHES[:2], with_value(BATCHES[2], what, value)], IDS)
    untroubled = learner(config, tiny_policy_dir)
    expected, _ = untroubled.update(BATCHES[:2], IDS[:2])
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (2, 2)
    assert stats["nonfinite_rows"] == (what != "advantage")
    assert all(math.isfinite(number) for number in stats.values())
    assert_equal(weights(policy), weights(untroubled))
    for name in ("loss", "kl_loss", "grad_norm", "ratio_mean"):
        assert stats[name] == expected[name], name


def test_averages_leave_out_the_rows_that_nobody_could_score(config: Config, tiny_policy_dir: Path) -> None:
    stats, _ = learner(config, tiny_policy_dir).update([with_value(BATCHES[0], "rollout", math.nan)], IDS[:1])
    rows, model = BATCHES[0].trajectories, AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    kl, tokens = 0.0, 0
    for n in range(1, 8):
        part = rows.layout.slice_of(n)
        with torch.no_grad():
            logp_TV = torch.log_softmax(model(rows.input_T[part][None]).logits[0], -1)
        logp_T = logp_TV.gather(-1, rows.label_T[part][:, None])[:, 0] - BATCHES[0].reference.unit_T[part]
        kl += float(logp_T[rows.action_T[part]].sum())
        tokens += int(rows.action_T[part].sum())
    assert stats["tokens"] == tokens
    assert stats["kl_sequence"] == pytest.approx(kl / 7, rel=1e-4)
    assert stats["kl_token"] == pytest.approx(kl / tokens, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_not_finite_learn_nothing_and_are_neither_saved_nor_sent(
    stage: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    policy = learner(learner_config(stage), tiny_policy_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    parameter = policy._engine.parameters[name]
    with policy._engine.gathered(parameter, modify=True):
        parameter.data[3, 5] = math.nan
    stats, _ = policy.update(BATCHES, IDS)
    assert (stats["optimizer_steps"], stats["skipped_steps"], stats["nonfinite_rows"]) == (0, 4, 24)
    sent: list[str] = []
    with pytest.raises(RunError, match=rf"policy weight {name}: 1 of 8192 values are NaN or infinite"):
        sent.extend(bucket.names[0] for bucket in policy.weight_buckets(1))
    assert sent
    assert name not in sent
    with pytest.raises(RunError, match=rf"policy weight {name}: .*run.resume=true"):
        policy.save(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_finite_weight_of_any_size_is_sent(config: Config, tiny_policy_dir: Path) -> None:
    policy = learner(config, tiny_policy_dir)
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        policy._engine.parameters["model.norm.weight"].fill_(largest)
    # Their sum overflows, and they are finite all the same.
    assert (weights(policy)["model.norm.weight"] == largest).all()


def test_moments_that_are_not_finite_are_not_saved(
    config: Config, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    policy = learner(config, tiny_policy_dir)
    moment = policy._engine.read_state("model.norm.weight", "exp_avg_sq")
    policy._engine.write_state("model.norm.weight", "exp_avg_sq", torch.full_like(moment, math.inf))
    with pytest.raises(RunError, match=r"exp_avg_sq of policy weight model\.norm\.weight: 64 of 64"):
        policy.save(tmp_path)
    assert not (tmp_path / "policy_state" / "optimizer.json").exists()
