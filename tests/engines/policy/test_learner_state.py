"""Buckets, saved policies and exact resume of one learner rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learner_rows import BATCHES, IDS, assert_equal, learner, learner_config, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2m_ray.config.schema import (
    Config,
)
from r2m_ray.errors import RunError

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("model_dir", ["tiny_policy_dir", "tied_policy_dir"])
def test_buckets_and_saved_policy_hold_every_weight_once(
    model_dir: str, stage: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = request.getfixturevalue(model_dir)
    policy = learner(learner_config(stage), directory)
    original = load_file(directory / "model.safetensors")
    assert_equal(weights(policy), original)
    listed = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in policy.weights()]
    assert policy.weight_shapes() == listed
    assert sorted(name for name, _, _ in listed) == sorted(original)
    policy.update(BATCHES, IDS)
    policy.save(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trained = weights(policy)
    assert trained.keys() == original.keys()
    assert not torch.equal(trained["model.norm.weight"], original["model.norm.weight"])
    assert_equal({name: p.detach() for name, p in exported.named_parameters()}, trained)
    given, saved = (AutoTokenizer.from_pretrained(d) for d in (directory, tmp_path / "policy"))
    assert saved("w0 w155 <eos>").input_ids == given("w0 w155 <eos>").input_ids


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_is_exact(stage: int, tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = learner_config(stage)
    config.policy.warmup_steps = 10
    policy = learner(config, tiny_policy_dir)
    policy.update(BATCHES, IDS)
    policy.save(tmp_path)
    uninterrupted = [policy.update(BATCHES, IDS)[0] for _ in range(2)]

    resumed = learner(config, tiny_policy_dir)
    resumed.load(tmp_path)
    assert [resumed.update(BATCHES, IDS)[0] for _ in range(2)] == uninterrupted
    assert_equal(weights(resumed), weights(policy))

    forgetful = learner(config, tiny_policy_dir)
    state = tmp_path / "policy_state" / "optimizer-00001.safetensors"
    tensors = load_file(state)
    save_file({n: t * 0 if n.startswith("exp_avg/") else t for n, t in tensors.items()}, state)
    forgetful.load(tmp_path)
    forgetful.update(BATCHES, IDS)
    forgetful.update(BATCHES, IDS)
    assert not torch.equal(weights(forgetful)["lm_head.weight"], weights(policy)["lm_head.weight"])


def test_state_can_be_saved_before_the_first_step(
    config: Config, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    policy = learner(config, tiny_policy_dir)
    policy.save(tmp_path)
    assert json.loads((tmp_path / "policy_state" / "optimizer.json").read_text()) == {"optimizer_steps": 0}
    expected, _ = policy.update(BATCHES, IDS)
    trained = weights(policy)
    policy.load(tmp_path)
    assert policy.update(BATCHES, IDS)[0] == expected
    assert_equal(weights(policy), trained)


def test_foreign_or_incomplete_state_is_refused(
    config: Config, tiny_policy_dir: Path, tied_policy_dir: Path, tmp_path: Path
) -> None:
    learner(config, tied_policy_dir).save(tmp_path)
    policy = learner(config, tiny_policy_dir)
    with pytest.raises(RunError, match=r"does not belong to this policy"):
        policy.load(tmp_path)
    policy.save(tmp_path)
    state = tmp_path / "policy_state" / "optimizer-00001.safetensors"
    tensors = load_file(state)
    del tensors["exp_avg/model.norm.weight"]
    save_file(tensors, state)
    with pytest.raises(RunError, match=r"lacks 1 tensors, exp_avg/model.norm.weight among them"):
        policy.load(tmp_path)
