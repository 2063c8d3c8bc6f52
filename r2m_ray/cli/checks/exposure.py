"""Who else could reach a run's cluster: whoever connects to Ray runs code there, unless it asks for a token.

The rules are Ray's own (2.59 and later). ``RAY_AUTH_MODE=token`` turns tokens on; where it is not set, a
cluster that a run starts turns them on by itself, and joining the cluster of this machine (``auto``, without
``RAY_ADDRESS``) does where there is a token. The token is ``RAY_AUTH_TOKEN``, or the content of the file
``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``. A Ray job inherits all of it from the node that it runs on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from r2m_ray.config.schema import ClusterConfig
from r2m_ray.errors import Problem, shown

FIELD = "cluster.address"
NONE, LOCAL, AUTO = "none", "local", "auto"
MODE, TOKEN, TOKEN_PATH, ADDRESS = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
UNSAFE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
ACCEPT = "or accept it with cluster.allow_unauthenticated=true"
REMEDY = (
    "set RAY_AUTH_MODE=token here and where the cluster is started (`ray get-auth-token --generate` makes a "
    f"token), {ACCEPT}"
)


def exposure_problems(cluster: ClusterConfig, environment: Mapping[str, str] | None = None) -> list[Problem]:
    """What would let others into the run's cluster; an error, or a warning where the run accepts it.

    environment: of this process, unless another one is given.
    """
    found = os.environ if environment is None else environment
    problems = []
    fault = _unauthenticated(cluster.address, found)
    if fault:
        problems.append(Problem(FIELD, fault, warning=cluster.allow_unauthenticated))
    file = _token_file(found)
    is_shared = cluster.address not in (NONE, LOCAL) and TOKEN not in found
    if not fault and is_shared and file.is_file() and file.stat().st_mode & OTHERS:
        problems.append(Problem(str(file), f"others may read this token; chmod 600 {file}", warning=True))
    if found.get(UNSAFE, "0") != "0":
        message = "lets vLLM unpickle what it is sent, which can run code; unset it, nothing here needs it"
        problems.append(Problem(UNSAFE, message))
    return problems


def _unauthenticated(address: str, found: Mapping[str, str]) -> str | None:
    """Why the cluster would ask nobody for a token, or would not be given one; None where all is well."""
    mode = found.get(MODE)
    if address == NONE:
        return None
    if address == LOCAL:
        # Ray makes the token of a new cluster itself.
        if mode is None or mode.lower() == "token":
            return None
        return f"local, but {MODE}={shown(mode)} starts the cluster without tokens; unset {MODE}, {ACCEPT}"
    if mode is None and address == AUTO and ADDRESS not in found and _has_token(found):
        return None
    if mode is None or mode.lower() != "token":
        state = "is not set" if mode is None else f"is {shown(mode)}"
        return f"{shown(address)} is joined without a token, because {MODE} {state}; {REMEDY}"
    if not _has_token(found):
        return (
            f"{shown(address)} asks for a token, and there is none; put the cluster's into "
            f"{_token_file(found)} (mode 0600), or into {TOKEN}"
        )
    return None


def _has_token(found: Mapping[str, str]) -> bool:
    file = _token_file(found)
    return bool(found.get(TOKEN)) or (file.is_file() and file.stat().st_size > 0)


def _token_file(found: Mapping[str, str]) -> Path:
    given = found.get(TOKEN_PATH)
    return Path(given) if given else Path(found.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
