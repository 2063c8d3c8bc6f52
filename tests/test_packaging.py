"""A wheel holds what a checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_every_package_and_the_configuration() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "r2m_ray").rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found | {"r2m_ray.conf"}
    assert setuptools["package-dir"] == {"r2m_ray.conf": "conf"}
    data = {
        file
        for pattern in setuptools["package-data"]["r2m_ray.conf"]
        for file in (ROOT / "conf").glob(pattern)
    }
    assert data == set((ROOT / "conf").rglob("*.yaml"))
