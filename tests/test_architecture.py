"""The arrows of the house: who may import whom, and the size of the rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "r2m_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_core_is_torch_and_the_standard_library() -> None:
    for path in sorted((PACKAGE / "core").glob("*.py")):
        outside = {m for m in roots(path) if m not in sys.stdlib_module_names} - {"torch", "r2m_ray"}
        assert outside == set(), path
        assert all(m.startswith("r2m_ray.core") for m in imports(path) if m.startswith("r2m_ray")), path


def test_only_runtime_imports_ray() -> None:
    importers = [path for path in MODULES if "ray" in roots(path)]
    assert [name for name in names(importers) if not name.startswith("runtime/")] == []


@pytest.mark.parametrize("engine", ["vllm", "deepspeed"])
def test_engines_are_imported_by_their_own_models_only(engine: str) -> None:
    importers = names([path for path in MODULES if engine in roots(path)])
    assert importers, f"nothing imports {engine}"
    assert [name for name in importers if not name.startswith("models/")] == []


def test_the_driver_knows_no_engine() -> None:
    assert roots(PACKAGE / "driver.py") & {"ray", "vllm", "deepspeed", "transformers", "trl"} == set()
    assert not any(
        m.startswith(("r2m_ray.runtime", "r2m_ray.models")) for m in imports(PACKAGE / "driver.py")
    )


def test_models_do_not_know_the_runtime_or_the_driver() -> None:
    for path in sorted((PACKAGE / "models").glob("*.py")):
        forbidden = ("r2m_ray.runtime", "r2m_ray.driver", "r2m_ray.tasks", "r2m_ray.stages")
        assert not any(m.startswith(forbidden) for m in imports(path)), path


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in ``sys.modules`` of a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_config_loads_without_torch() -> None:
    assert (
        loaded_after("import r2m_ray.config") & {"torch", "ray", "vllm", "deepspeed", "transformers"} == set()
    )


def test_importing_the_driver_loads_no_engine() -> None:
    assert loaded_after("import r2m_ray.driver") & {"ray", "vllm", "deepspeed"} == set()


def test_only_the_device_module_names_cuda() -> None:
    naming = [path for path in MODULES if "cuda" in path.read_text().lower()]
    assert names(naming) == ["runtime/device.py"]


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for path in MODULES:
        assert roots(path) & banned == set(), path
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert calls & {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"} == set(), path


def test_files_and_functions_stay_small() -> None:
    long_files = [path for path in MODULES if len(path.read_text().splitlines()) > 300]
    assert names(long_files) == []
    long_functions = [
        f"{path.relative_to(PACKAGE)}:{f.name}"
        for path in MODULES
        for f in functions(path)
        if (f.end_lineno or 0) - f.lineno > 60
    ]
    assert long_functions == []


def test_no_exception_is_swallowed() -> None:
    silent = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body)
    ]
    assert silent == []
