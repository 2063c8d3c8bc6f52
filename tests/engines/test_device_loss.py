"""A failed device or peer is one type of error, found by the type that torch raises."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from r2m_ray.engines.device_loss import raises_device_loss
from r2m_ray.engines.policy.learner import PolicyLearner
from r2m_ray.engines.policy.reference import ReferencePolicy
from r2m_ray.engines.reward.engine import RewardEngine
from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.errors import DeviceLost


@raises_device_loss("engine")
class Failing:
    """Raises what it was made with, wherever it is used."""

    def __init__(self, error: Exception, *, at_start: bool = False) -> None:
        self.error = error
        if at_start:
            raise error

    def call(self) -> None:
        raise self.error

    def parts(self) -> Iterator[int]:
        yield 1
        raise self.error


@pytest.mark.parametrize("kind", [torch.AcceleratorError, DistBackendError, DistNetworkError])
def test_failures_of_devices_and_peers_are_device_losses(kind: type[Exception]) -> None:
    error = kind("unspecified launch failure")
    engine = Failing(error)
    with pytest.raises(DeviceLost, match=r"engine: .*unspecified launch failure") as raised:
        engine.call()
    assert raised.value.__cause__ is error
    # Ray sends errors from process to process so.
    assert isinstance(pickle.loads(pickle.dumps(raised.value)), DeviceLost)  # noqa: S301
    with pytest.raises(DeviceLost):
        list(engine.parts())
    with pytest.raises(DeviceLost):
        Failing(error, at_start=True)


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, ValueError])
def test_other_failures_stay_what_they_are(kind: type[Exception]) -> None:
    engine = Failing(kind("CUDA error: NCCL"))
    for use in (engine.call, lambda: list(engine.parts())):
        with pytest.raises(kind) as raised:
            use()
        assert not isinstance(raised.value, DeviceLost)


@pytest.mark.parametrize("engine", [PolicyLearner, ReferencePolicy, RewardEngine, RolloutEngine])
def test_every_engine_reports_device_losses(engine: type) -> None:
    public = [m for name, m in vars(engine).items() if callable(m) and not name.startswith("_")]
    assert public
    assert all(hasattr(method, "__wrapped__") for method in public)
