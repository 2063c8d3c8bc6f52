"""Real runs in processes of their own, with faults in known places, and what an undisturbed one leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import SMALL

from r2m_ray.config.compose import load_config
from r2m_ray.run.vocabulary import MACHINE_PREFIXES
from r2m_ray.tasks.prepare.store import prepare

SETTINGS = (
    *SMALL, "algo.steps=6", "task.max_new_tokens=16", "evaluate.every=3", "evaluate.prompts=4",
    "evaluate.pairs=4", "checkpoint.every=2", "checkpoint.keep=2", "cluster.cpus=4",
    "cluster.object_store_gb=0.2", "cluster.phase_timeout_s=120", "cluster.stop_grace_s=100",
    "cluster.start_timeout_s=240",
)  # fmt: skip
DEADLINE_S = 900.0
MARK = "R2M_RUN_MARK"
"""An environment variable that every process of a run inherits, by which none is overlooked afterwards."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Finished:
    """A run that ended: its exit code, what it printed, and its files."""

    code: int
    text: str
    directory: Path
    seconds: float
    evidence: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row of its metrics, without what the machine decides."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if not key.startswith(MACHINE_PREFIXES)}
            for line in lines
        ]

    @property
    def tensors(self) -> dict[str, str]:
        """sha256 of every tensor file of the newest checkpoint."""
        newest = sorted((self.directory / "checkpoints").glob("step-*"))[-1]
        files = sorted(newest.rglob("*.safetensors"))
        return {str(f.relative_to(newest.parent)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    def assert_same(self, undisturbed: Finished) -> None:
        """SAME: equal metrics but for times, equal sha256 of all final tensors."""
        assert self.code == 0, self.text
        assert self.rows == undisturbed.rows
        assert self.tensors == undisturbed.tensors

    @property
    def commits(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "checkpoints").glob("step-*"))


@dataclass
class Running:
    """A run in a process of its own."""

    process: subprocess.Popen[bytes]
    directory: Path
    mark: str
    output: Path
    faults: Path
    temporary: Path
    shared_memory: frozenset[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, deadline_s: float = DEADLINE_S) -> Finished:
        """Wait for its end; a run that misses the deadline is killed and fails the test."""
        try:
            code = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the run did not end within {deadline_s} s:\n{self.output.read_text()}")
        seconds = time.monotonic() - self.started
        evidence = sorted(path.name for path in self.faults.iterdir())
        return Finished(code, self.output.read_text(), self.directory, seconds, evidence)

    def until(self, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Wait until a condition on the run's files holds; the run's end or the deadline fails the test."""
        limit = time.monotonic() + deadline_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"waited in vain; the run printed:\n{self.output.read_text()}")
            time.sleep(0.02)

    def finished_steps(self) -> int:
        """Steps in its metrics so far."""
        file = self.directory / "metrics.jsonl"
        return file.read_text().count('"kind": "step"') if file.exists() else 0

    def processes(self) -> list[psutil.Process]:
        """Every process that carries its mark."""
        return marked(self.mark)

    def actor(self, title: str) -> psutil.Process:
        """The process that Ray has titled with an actor's class."""
        return next(
            p for p in self.processes() if p.cmdline()[:1] and p.cmdline()[0].startswith(f"ray::{title}")
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """What a terminal does: every process of the foreground group gets the signal."""
        os.killpg(self.process.pid, number)


def held(path: Path) -> bool:
    """Whether a process has a file open or mapped."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if str(path) in Path(f"/proc/{process.pid}/maps").read_text():
                return True
            if any(file.path == str(path) for file in process.open_files()):
                return True
    return False


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Lab:
    """Starts runs that share prepared models; each has a root, a temporary directory and a mark."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.common = [*SETTINGS, f"prepare.root={root / 'prepared'}"]
        self._count = 0
        self._undisturbed: dict[str, Finished] = {}
        self._temporary: list[Path] = []
        prepare(load_config(self.common))

    def start(self, name: str, *overrides: str, faults: Sequence[str] = (), again: bool = False) -> Running:
        """Start a run of this name; ``again`` continues it. Faults read as in ``r2m_ray.engines.faults``."""
        self._count += 1
        evidence = self.root / f"evidence-{self._count}"
        evidence.mkdir()
        output = self.root / f"output-{self._count}.txt"
        mark = f"{self.root}-{self._count}"
        temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        self._temporary.append(temporary)
        shared_memory = frozenset(SHARED_MEMORY.glob("*"))
        environment = os.environ | {
            MARK: mark,
            "TMPDIR": str(temporary),
            "R2M_TESTING": "1",
            "R2M_FAULTS": ",".join(faults),
            "R2M_FAULTS_DIR": str(evidence),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            *(sys.executable, "-m", "r2m_ray", "train"),
            *(*self.common, f"run.root={self.root / 'runs'}", f"run.name={name}"),
            *overrides,
            *(["run.resume=true"] if again else []),
        ]
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        directory = self.root / "runs" / name
        return Running(process, directory, mark, output, evidence, temporary, shared_memory)

    def run(
        self,
        name: str,
        *overrides: str,
        faults: Sequence[str] = (),
        again: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> Finished:
        """Start a run and wait for its end."""
        running = self.start(name, *overrides, faults=faults, again=again)
        try:
            return running.wait(deadline_s)
        finally:
            self.clean(running)

    def once(self, name: str, *overrides: str, deadline_s: float = DEADLINE_S) -> Finished:
        """An undisturbed run of these settings, made when it is first asked for."""
        if name not in self._undisturbed:
            self._undisturbed[name] = self.run(name, *overrides, deadline_s=deadline_s)
            assert self._undisturbed[name].code == 0, self._undisturbed[name].text
        return self._undisturbed[name]

    def close(self) -> None:
        for directory in self._temporary:
            shutil.rmtree(directory)

    def read(self, directory: Path) -> Finished:
        """A finished run that was made in this process."""
        return Finished(0, "", directory, 0.0, [])

    def temporary_files(self, running: Running) -> list[Path]:
        """What a run has left below the temporary directory, and in its own."""
        return [*running.temporary.glob("*"), *(running.directory / "checkpoints").glob(".tmp-*")]

    def shared_memory(self, running: Running) -> list[Path]:
        """Shared memory that came since a run began and that no living process holds."""
        new = set(SHARED_MEMORY.glob("*")) - running.shared_memory
        return sorted(path for path in new if not held(path))

    def clean(self, running: Running, *, killed: bool = False) -> None:
        """CLEAN: a run leaves no process, temporary file or shared memory; leftovers are ended and named."""
        limit = time.monotonic() + 30
        while (left := running.processes()) and time.monotonic() < limit:
            time.sleep(0.1)
        named = [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in left]
        for process in left:
            process.kill()
        assert not named, f"processes outlived the run by 30 s: {named}"
        kept = [*self.temporary_files(running), *self.shared_memory(running)]
        assert killed or not kept, f"temporary files are left: {kept}"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    # Sockets need short paths.
    with tempfile.TemporaryDirectory(prefix="r2m-f", dir="/tmp") as root:
        lab = Lab(Path(root))
        yield lab
        lab.close()


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Finished:
    """The run that every other one must equal."""
    return lab.once("undisturbed")
