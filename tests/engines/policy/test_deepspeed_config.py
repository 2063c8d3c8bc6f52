"""What a user may tell DeepSpeed, and what we keep for ourselves."""

from __future__ import annotations

from typing import Any

import pytest

from r2m_ray.config.schema import Config, Dtype, ModelConfig, PolicyConfig
from r2m_ray.engines.policy.deepspeed_config import OWNED, deepspeed_config
from r2m_ray.errors import InputError


def built(overrides: dict[str, Any], dtype: Dtype = Dtype.float32) -> dict[str, Any]:
    policy = PolicyConfig(learning_rate=3e-5, weight_decay=0.1, max_grad_norm=0.5, deepspeed=overrides)
    return deepspeed_config(Config(policy=policy, model=ModelConfig(dtype=dtype)))


def nested(path: str, value: object) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def test_base_follows_the_policy_config() -> None:
    settings = built({})
    assert settings["gradient_clipping"] == 0.5
    assert settings["optimizer"]["params"] == {"lr": 3e-5, "weight_decay": 0.1, "torch_adam": True}
    assert settings["zero_optimization"] == {"stage": 2}
    assert settings["bf16"]["enabled"] is False
    assert built({}, Dtype.bfloat16)["bf16"] == {"enabled": True, "check_grad_overflow": True}


def test_a_users_key_wins_and_its_neighbours_stay() -> None:
    settings = built(
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "optimizer": {"params": {"betas": [0.9, 0.95]}},
            "wall_clock_breakdown": True,
        }
    )
    assert settings["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert settings["optimizer"]["params"]["lr"] == 3e-5
    assert settings["optimizer"]["type"] == "AdamW"
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize("path", OWNED)
def test_contradictions_name_key_and_remedy(path: str) -> None:
    with pytest.raises(InputError, match=rf"policy.deepspeed.{path}: .*remove the key"):
        built(nested(path, 1))


def test_whole_sections_of_ours_are_refused_by_any_of_their_keys() -> None:
    with pytest.raises(InputError, match=r"policy.deepspeed.fp16.enabled: set model.dtype"):
        built({"fp16": {"enabled": True}})


@pytest.mark.parametrize(
    ("overrides", "dtype", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, Dtype.float32, "optimizer.type=Lamb: .*use Adam or AdamW"),
        ({"zero_optimization": {"stage": 4}}, Dtype.float32, "stage=4: choose 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, Dtype.bfloat16, "stage=0 .*model.dtype=float32"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused(
    overrides: dict[str, Any], dtype: Dtype, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        built(overrides, dtype)
