"""Faults on demand: refused outside tests, exact about where and when, and never twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2m_ray.__main__ import main
from r2m_ray.engines import faults
from r2m_ray.engines.faults import reach, refuse_faults
from r2m_ray.errors import InputError


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R2M_TESTING", "1")
    monkeypatch.setenv("R2M_FAULTS_DIR", str(tmp_path))
    monkeypatch.setenv("R2M_ACTOR", "reward-0")
    monkeypatch.setattr(faults, "_step", None)
    return tmp_path


def happened(evidence: Path) -> list[str]:
    return sorted(path.name for path in evidence.iterdir())


def test_a_users_run_refuses_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("R2M_TESTING", raising=False)
    monkeypatch.setenv("R2M_FAULTS", "rollout-0@1:sample:kill")
    assert main(["--version"]) == 2
    assert "R2M_FAULTS is set" in capsys.readouterr().err
    reach("sample", 1)


@pytest.mark.parametrize("fault", ["rollout", "rollout-0@1:sample:explode", "rollout-0@one:sample:kill"])
def test_what_does_not_read_as_a_fault_is_refused(fault: str) -> None:
    with pytest.raises(InputError, match=r"is not actor@step:point:action"):
        refuse_faults({"R2M_FAULTS": fault, "R2M_TESTING": "1"})


def test_a_fault_happens_at_its_place_and_step_only(evidence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2M_FAULTS", "reward-0@2:annotate:raise,rollout-0@2:annotate:raise")
    reach("annotate", 1)
    reach("update", 2)
    assert happened(evidence) == []
    with pytest.raises(RuntimeError, match="reward-0@2:annotate:raise"):
        reach("annotate", 2)
    assert happened(evidence) == ["0-reward-0.2.annotate.raise"]
    # The step is computed again after the recovery.
    reach("annotate", 2)


def test_a_point_without_a_step_belongs_to_the_last_one_named(
    evidence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R2M_FAULTS", "reward-0@3:save:raise")
    reach("save")
    reach("annotate", 3)
    with pytest.raises(RuntimeError):
        reach("save")


def test_the_same_fault_asked_for_twice_happens_twice(
    evidence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R2M_FAULTS", "reward-0@any:save:raise,reward-0@any:save:raise")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            reach("save")
    reach("save")
    assert len(happened(evidence)) == 2
