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
    beside_code = {file for file in (ROOT / "r2m_ray").rglob("*.*") if file.suffix not in (".py", ".pyc")}
    data = {
        file
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for file in (ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))).glob(pattern)
    }
    assert data == set((ROOT / "conf").rglob("*.yaml")) | beside_code
