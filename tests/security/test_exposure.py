"""Who may reach the cluster: a token everywhere, and no server that nobody needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2m_ray.cli.checks.preflight import exposure_problems, preflight
from r2m_ray.config.schema import ClusterConfig, Config
from r2m_ray.errors import Problem

PACKAGE = Path(__file__).resolve().parents[2] / "r2m_ray"
SECRET = "canary-token-0123456789"


def found(
    address: str, home: Path, *, token: bool = False, accepted: bool = False, **environment: str
) -> list[Problem]:
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(SECRET)
        (home / ".ray" / "auth_token").chmod(0o600)
    cluster = ClusterConfig(address=address, allow_unauthenticated=accepted)
    return exposure_problems(cluster, {"HOME": str(home), **environment})


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head:10001"])
def test_a_remote_cluster_without_token_is_refused_unless_accepted(address: str, tmp_path: Path) -> None:
    (problem,) = found(address, tmp_path)
    assert not problem.warning
    assert str(problem).startswith(f"cluster.address: {address} is joined without a token")
    assert "RAY_AUTH_MODE=token" in str(problem)
    assert "cluster.allow_unauthenticated=true" in str(problem)
    (problem,) = found(address, tmp_path, accepted=True)
    assert problem.warning


def test_a_token_has_to_be_turned_on_as_ray_does(tmp_path: Path) -> None:
    assert found("auto", tmp_path, token=True) == []
    (elsewhere,) = found("auto", tmp_path, RAY_ADDRESS="10.0.0.1:6379")
    assert "because RAY_AUTH_MODE is not set" in elsewhere.message
    (explicit,) = found("10.0.0.1:6379", tmp_path)
    assert "because RAY_AUTH_MODE is not set" in explicit.message
    (disabled,) = found("auto", tmp_path, RAY_AUTH_MODE="disabled")
    assert "because RAY_AUTH_MODE is disabled" in disabled.message
    assert found("10.0.0.1:6379", tmp_path, RAY_AUTH_MODE="token") == []


def test_a_job_inherits_its_nodes_token(tmp_path: Path) -> None:
    job = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"}
    assert found("auto", tmp_path, **job, RAY_AUTH_TOKEN=SECRET) == []
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o600)
    assert found("auto", tmp_path, **job, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")) == []
    (missing,) = found("auto", tmp_path, **job, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert "asks for a token, and there is none" in missing.message
    assert str(tmp_path / "none") in missing.message


def test_a_cluster_of_ones_own_has_a_token_unless_that_is_turned_off(tmp_path: Path) -> None:
    assert found("local", tmp_path) == []
    assert found("local", tmp_path, RAY_AUTH_MODE="token") == []
    assert found("none", tmp_path, RAY_AUTH_MODE="disabled") == []
    (problem,) = found("local", tmp_path, RAY_AUTH_MODE="disabled")
    assert not problem.warning
    assert "unset RAY_AUTH_MODE" in problem.message


def test_a_token_that_others_may_read_is_a_warning_that_does_not_show_it(tmp_path: Path) -> None:
    assert found("auto", tmp_path, token=True) == []
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    (problem,) = found("auto", tmp_path)
    assert problem.warning
    assert f"chmod 600 {tmp_path}/.ray/auth_token" in problem.message
    assert SECRET not in str(problem)
    # Ray makes the token of a cluster of one's own, for this one cluster.
    assert found("local", tmp_path) == []


def test_unpickling_by_vllm_is_refused(tmp_path: Path) -> None:
    assert found("local", tmp_path, VLLM_ALLOW_INSECURE_SERIALIZATION="0") == []
    (problem,) = found("local", tmp_path, VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    assert problem.path == "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert not problem.warning


def test_training_checks_it_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config()
    config.run.root, config.model.policy, config.model.reward = str(tmp_path), "org/policy", "org/reward"
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert preflight(config) == []
    config.cluster.address = "10.0.0.1:6379"
    assert [problem.path for problem in preflight(config)] == ["cluster.address"]


# The source


def test_nothing_here_allows_it_or_starts_a_server() -> None:
    servers = ("vllm.entrypoints", "http.server", "socketserver", "fastapi", "uvicorn", "aiohttp", "xmlrpc")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        assert path.name == "preflight.py" or "INSECURE_SERIALIZATION" not in text, path
        imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert [name for name in imported if name.startswith(servers)] == [], path


def test_every_local_cluster_is_started_without_dashboard() -> None:
    starts = [
        call
        for path in (PACKAGE / "runtime").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("ray.init", "_connected")
    ]
    own = [call for call in starts if any(ast.unparse(k) == "address='local'" for k in call.keywords)]
    assert len(own) == 1
    assert all(any(ast.unparse(k) == "include_dashboard=False" for k in call.keywords) for call in own)


CLUSTER = """
import json, os
from r2m_ray.config.schema import ClusterConfig, Config
from r2m_ray.runtime.cluster import cluster

with cluster(ClusterConfig(object_store_gb=0.1, cpus=1)):
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    print(json.dumps([is_token_auth_enabled(), os.path.exists(os.path.expanduser("~/.ray/auth_token"))]))
"""


@pytest.mark.e2e
def test_a_cluster_of_ones_own_asks_for_a_token(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER],
        env={**clean, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[true, true]"
