"""The W&B mirror with the real client: whatever goes wrong there, the run's own files are complete."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from r2m_ray.run.files import read_steps

WANDB_RUN = """
import http.server, os, signal, sys, threading, time
from pathlib import Path
import psutil
from omegaconf import OmegaConf
from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.run.log import RunLog

def log(directory, mode, resume=False):
    config = Config()
    config.logging.wandb, config.run.resume = WandbMode(mode), resume
    return RunLog(directory, config=config, resolved_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)))

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def started(kept):
    # W&B has started and taken the row.
    wait_for(lambda: kept._wandb._rows.empty() and list(kept.directory.glob("wandb/*run-*/*.wandb")))

def service():
    # W&B's service process knows the process that started it, and so does the address.
    starter = os.environ["WANDB_SERVICE"].split("-")[1]
    found = [p for p in psutil.process_iter(["cmdline"]) if starter in (p.info["cmdline"] or [])]
    (process,) = [p for p in found if p.name() == "wandb-core"]
    return process

root = Path(sys.argv[1])
"""


def run_wandb(tmp_path: Path, script: str, **environ: str) -> tuple[list[str], list[dict[str, object]]]:
    """A script's warnings and rows; in a process of its own, because there is one W&B client per process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN + script, str(tmp_path)],
        env={**clean, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("W&B")]
    return warnings, read_steps(tmp_path / "run" / "metrics.jsonl")


def tracked(directory: Path) -> list[list[dict[str, float]]]:
    """The rows that each of W&B's files below a run's directory holds, in the order of the starts."""
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"))
    return [[row for row in _rows(path) if "_step" in row] for path in files]


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """Rows of a W&B file: a header of 7 bytes, then records in blocks of 32 KiB (LevelDB's log format)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # A complete record, or the last part of one.
            history = Record.FromString(record).history
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
            record = b""


def numbers(rows: list[dict[str, float]]) -> list[tuple[float | None, ...]]:
    return [(row["_step"], row.get("a"), row.get("eval/a")) for row in rows]


def test_disabled_never_imports_it_and_a_dying_service_costs_one_warning(tmp_path: Path):
    script = """
with log(root / "off", "disabled") as quiet:
    quiet.step(1, {"a": 1.0})
assert "wandb" not in sys.modules
with log(root / "run", "offline") as kept:
    kept.step(1, {"a": 1.0})
    started(kept)
    service().kill()
    for t in range(2, 300):
        kept.step(t, {"a": float(t)})
"""
    (warning,), rows = run_wandb(tmp_path, script)
    assert [row["a"] for row in rows] == [float(t) for t in range(1, 300)]
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in warning
    # The next start sends them all, because W&B finished none.
    script = """
with log(root / "run", "offline", resume=True) as kept:
    kept.rewind(299)
    kept.step(300, {"a": 300.0})
"""
    warnings, _ = run_wandb(tmp_path, script)
    assert warnings == []
    assert numbers(tracked(tmp_path / "run")[-1]) == [(t, t, None) for t in range(1, 301)]


def test_a_signal_to_all_descendants_loses_no_row(tmp_path: Path):
    """Ray stops a job so."""
    script = """
signal.signal(signal.SIGTERM, lambda *_: None)
with log(root / "run", "offline") as kept:
    kept.evaluation(0, {"a": 0.5})
    kept.step(1, {"a": 1.0})
    started(kept)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        process.send_signal(signal.SIGTERM)
    kept.step(2, {"a": 2.0})
    kept.evaluation(2, {"a": 2.5})
"""
    warnings, _ = run_wandb(tmp_path, script)
    assert warnings == []
    (rows,) = tracked(tmp_path / "run")
    assert numbers(rows) == [(0, None, 0.5), (1, 1, None), (2, 2, 2.5)]


def test_a_later_start_sends_what_is_missing_and_nothing_twice(tmp_path: Path):
    first = """
with log(root / "run", "offline") as kept:
    kept.rewind(0)
    for t in (1, 2, 3):
        kept.step(t, {"a": float(t)})
# Steps that W&B never got, as where it was disabled or the process was killed.
with log(root / "run", "disabled", resume=True) as kept:
    kept.rewind(2)
    for t in (3, 4, 5):
        kept.step(t, {"a": float(t)})
"""
    second = """
with log(root / "run", "offline", resume=True) as kept:
    kept.rewind(4)
    for t in (5, 6):
        kept.step(t, {"a": float(t)})
        kept.evaluation(t, {"a": t + 0.5})
    kept.rewind(5)  # A recovery computes the step again.
    kept.step(6, {"a": 6.0})
    kept.step(7, {"a": 7.0})
"""
    assert run_wandb(tmp_path, first)[0] == []
    assert run_wandb(tmp_path, second)[0] == []
    before, after = tracked(tmp_path / "run")
    assert numbers(before) == [(1, 1, None), (2, 2, None), (3, 3, None)]
    assert numbers(after) == [(4, 4, None), (5, 5, 5.5), (6, 6, 6.5), (7, 7, None)]


def test_a_server_that_refuses_the_key_leaves_an_offline_run_and_one_warning(tmp_path: Path):
    script = """
class Refuse(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(401)
        self.end_headers()
    do_GET = do_POST
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
with log(root / "run", "online") as kept:
    for t in range(1, 4):
        kept.step(t, {"a": float(t)})
"""
    key = "0123456789" * 4
    (warning,), rows = run_wandb(tmp_path, script, WANDB_API_KEY=key)
    assert [row["a"] for row in rows] == [1.0, 2.0, 3.0]
    assert "keeps this run offline" in warning
    assert "wandb sync" in warning
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in kept)
    assert not any(key.encode() in path.read_bytes() for path in kept)


def test_a_server_that_never_answers_holds_no_step_up(tmp_path: Path):
    script = """
import socket
import r2m_ray.run.trackers
r2m_ray.run.trackers._START_SECONDS = 2.0
listening = socket.create_server(("127.0.0.1", 0))  # The system accepts; nobody reads.
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}"
with log(root / "run", "online") as kept:
    for t in range(1, 300):
        kept.step(t, {"a": float(t)})
    # Every step is written while W&B is still waiting for its first answer.
    assert not list((root / "run" / "wandb").glob("*run-*"))
"""
    (warning,), rows = run_wandb(tmp_path, script, WANDB_API_KEY="0123456789" * 4)
    assert [row["a"] for row in rows] == [float(t) for t in range(1, 300)]
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in warning
    # The offline run may have begun too late to finish. With the next start every row is in one of the files.
    script = """
with log(root / "run", "offline", resume=True) as kept:
    kept.rewind(299)
"""
    assert run_wandb(tmp_path, script)[0] == []
    sent = {place for rows in tracked(tmp_path / "run") for place in numbers(rows)}
    assert sent == {(t, t, None) for t in range(1, 300)}
