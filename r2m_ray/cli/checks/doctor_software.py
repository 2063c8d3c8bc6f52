"""Checks of what is installed and set up: Python, packages and their versions, keys and tokens."""

from __future__ import annotations

import netrc
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from r2m_ray.cli.checks.doctor_check import Check, Outcome, judged

PACKAGE = "r2m-ray"
ENGINE_EXTRAS = ("cpu", "gpu")
"""Extras of which one brings vLLM, as a build for CPUs or for GPUs."""
INSTALL = "pip install '.[cpu]' (or '.[gpu]') in a checkout of r2m_ray"
WANDB_HOST = "api.wandb.ai"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_FILE = Path(".ray/auth_token")


def software_checks() -> Iterator[Check]:
    """Python and package versions against the ranges in this package's metadata."""
    try:
        described = metadata(PACKAGE)
    except PackageNotFoundError:
        yield Check("packages", Outcome.failed, f"{PACKAGE} is not installed", INSTALL)
        return
    needed, found = SpecifierSet(described["Requires-Python"]), platform.python_version()
    outside = Outcome.failed if not needed.contains(found, prereleases=True) else None
    yield judged("Python", f"{found}, {needed} supported", outside, "make the environment with such a Python")
    requirements = [Requirement(line) for line in described.get_all("Requires-Dist") or ()]
    yield from package_checks(requirements)


def package_checks(requirements: Sequence[Requirement]) -> Iterator[Check]:
    """One check for all packages within their ranges, and one for each that is outside or missing."""
    plain = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    engines = [
        r
        for extra in ENGINE_EXTRAS
        for r in requirements
        if r not in plain and r.marker is not None and r.marker.evaluate({"extra": extra})
    ]
    faults = [check for requirement in plain if (check := _outside(requirement))]
    if installed := [r for r in engines if _version(r.name)]:
        faults += [check for requirement in installed if (check := _outside(requirement))]
    elif engines:
        names = " nor ".join(str(r.name) for r in engines)
        faults.append(Check("package vllm", Outcome.failed, f"neither {names} is installed", INSTALL))
    good = len(plain) + len(installed) - len(faults)
    if good:
        yield Check("packages", Outcome.ok, f"{good} within their tested ranges")
    yield from faults


def _outside(requirement: Requirement) -> Check | None:
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    value = f"{found or 'not installed'}, {requirement.specifier} supported"
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    return Check(f"package {requirement.name}", Outcome.failed, value, remedy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def secret_checks(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Iterator[Check]:
    """Whether a W&B key and a token for Ray are there; neither is ever shown."""
    home = home or Path.home()
    found = "in WANDB_API_KEY" if environment.get("WANDB_API_KEY") else _netrc_login(home / ".netrc")
    yield Check("W&B key", Outcome.ok, found or "absent; only logging=online needs one: wandb login")
    yield _token_check(environment, home / TOKEN_FILE)


def _netrc_login(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        return f"in {file}" if netrc.netrc(file).authenticators(WANDB_HOST) else None
    except (netrc.NetrcParseError, OSError) as error:
        return f"unknown: {file} cannot be read ({type(error).__name__})"


def _token_check(environment: Mapping[str, str], file: Path) -> Check:
    set_here = next((name for name in TOKEN_VARIABLES if environment.get(name)), None)
    if set_here:
        return Check("Ray token", Outcome.ok, f"in {set_here}")
    if not file.is_file():
        value = "absent; a local cluster makes its own, a cluster to join needs its own"
        return Check("Ray token", Outcome.ok, value)
    # Others read a file only if they may also search its directory.
    readable = Outcome.warning if file.stat().st_mode & 0o077 and file.parent.stat().st_mode & 0o011 else None
    value = f"in {file}, mode {file.stat().st_mode & 0o777:04o}"
    return judged("Ray token", value, readable, f"others can read it: chmod 600 {file}")
