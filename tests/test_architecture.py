"""The walls of the house: who may import whom, and what a room may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import run_python

PACKAGE = Path(__file__).resolve().parents[1] / "r2m_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    "errors",
    "core",
    "config",
    "engines",
    "tasks",
    "run",
    "report",
    "driver",
    "runtime",
    "cli",
    "__main__",
)
"""The rooms from the ground up: each may import those before it, and itself."""
CLOSED = {
    "core": {"config", "engines", "tasks", "run", "report", "driver", "runtime", "cli"},
    "driver": {"engines", "runtime", "cli", "report"},
    "report": {"engines", "driver", "runtime", "cli"},
    "run": {"driver", "report", "runtime", "cli"},
}
"""Rooms that a room must not know, whatever their floor."""


def room_of(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module or name that a file imports anywhere, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def rooms_known(path: Path) -> set[str]:
    ours = (name.split(".") for name in imports(path) if name.startswith("r2m_ray."))
    return {name[1] for name in ours} & set(FLOORS)


def upward(package: Path = PACKAGE) -> list[str]:
    """Imports that point up, or into a room that is closed to the one they stand in."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        if room not in FLOORS:
            continue
        above = set(FLOORS[FLOORS.index(room) + 1 :]) | CLOSED.get(room, set())
        found += [f"{path.relative_to(package)} -> {known}" for known in sorted(rooms_known(path) & above)]
    return found


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def circles() -> list[str]:
    """Modules that import one another in a circle."""
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    known = {name: imports(path) & set(modules) - {name} for name, path in modules.items()}
    found, done = [], set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for other in sorted(known[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())
    return found


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in ``sys.modules`` of a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    return set(run_python("-c", code)[0].split())


def test_the_package_has_twelve_entries() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__", *FLOORS}


def test_every_import_points_down() -> None:
    assert upward() == []


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "bad.py").write_text("from r2m_ray.driver.loop import train\n")
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "bad.py").write_text("def f():\n    from r2m_ray.engines import text\n")
    assert upward(tmp_path) == ["core/bad.py -> driver", "driver/bad.py -> engines"]


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles() == []


def test_core_is_torch_and_the_standard_library() -> None:
    for path in sorted((PACKAGE / "core").glob("*.py")):
        outside = {m for m in roots(path) if m not in sys.stdlib_module_names} - {"torch", "r2m_ray"}
        assert outside == set(), path


@pytest.mark.parametrize(
    ("engine", "room"), [("ray", "runtime"), ("vllm", "engines"), ("deepspeed", "engines")]
)
def test_each_engine_is_imported_in_one_room(engine: str, room: str) -> None:
    importers = [path for path in MODULES if engine in roots(path)]
    assert importers, f"nothing imports {engine}"
    assert [str(path) for path in importers if room_of(path) != room] == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import r2m_ray.config.schema", {"torch", "ray", "vllm", "deepspeed", "transformers"}),
        ("import r2m_ray.core.roles, r2m_ray.core.batch", {"ray", "vllm", "deepspeed", "transformers"}),
        ("import r2m_ray.driver.loop", {"ray", "vllm", "deepspeed"}),
        ("import r2m_ray.report.run_page", {"ray", "vllm", "deepspeed", "torch", "scipy", "matplotlib"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_a_room_needs(statement: str, absent: set[str]) -> None:
    assert loaded_after(statement) & absent == set()


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


def test_files_and_functions_stay_readable() -> None:
    long_files = [path for path in MODULES if len(path.read_text().splitlines()) > 500]
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
