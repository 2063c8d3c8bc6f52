"""The W&B mirror with the real client: whatever goes wrong there, the run's own files are complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from r2m_ray.run.files import read_steps

WANDB_RUN = """
import http.server, sys, threading, time
from pathlib import Path
import psutil
from omegaconf import OmegaConf
from r2m_ray.config.schema import Config, WandbMode
from r2m_ray.run.log import RunLog

def log(directory, mode):
    config = Config()
    config.logging.wandb = WandbMode(mode)
    return RunLog(directory, config=config, resolved_yaml=OmegaConf.to_yaml(OmegaConf.structured(config)))

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

root = Path(sys.argv[1])
"""


def run_wandb(tmp_path: Path, script: str, **environ: str) -> tuple[str, list[dict[str, object]]]:
    """A script's stderr and rows; in a process of its own, because there is one W&B client per process."""
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
    return done.stderr, read_steps(tmp_path / "run" / "metrics.jsonl")


class TestWandb:
    def test_disabled_never_imports_it_and_a_dying_service_costs_one_warning(self, tmp_path: Path):
        script = """
with log(root / "off", "disabled") as quiet:
    quiet.step(1, {"a": 1.0})
assert "wandb" not in sys.modules
with log(root / "run", "offline") as kept:
    kept.step(1, {"a": 1.0})
    wait_for(kept._wandb._rows.empty)  # W&B has started and taken the row.
    for child in psutil.Process().children(recursive=True):
        child.kill()
        child.wait(10)
    for t in range(2, 300):
        kept.step(t, {"a": float(t)})
"""
        printed, rows = run_wandb(tmp_path, script)
        assert [row["a"] for row in rows] == [float(t) for t in range(1, 300)]
        warnings = [line for line in printed.splitlines() if line.startswith("W&B")]
        assert len(warnings) == 1
        assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in warnings[0]

    def test_a_server_that_refuses_the_key_leaves_an_offline_run_and_one_warning(self, tmp_path: Path):
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
import os
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
with log(root / "run", "online") as kept:
    for t in range(1, 4):
        kept.step(t, {"a": float(t)})
"""
        key = "0123456789" * 4
        printed, rows = run_wandb(tmp_path, script, WANDB_API_KEY=key)
        assert [row["a"] for row in rows] == [1.0, 2.0, 3.0]
        warnings = [line for line in printed.splitlines() if line.startswith("W&B")]
        assert len(warnings) == 1
        assert "keeps this run offline" in warnings[0]
        assert "wandb sync" in warnings[0]
        kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert any(path.suffix == ".wandb" for path in kept)
        assert not any(key.encode() in path.read_bytes() for path in kept)

    def test_a_server_that_never_answers_holds_no_step_up(self, tmp_path: Path):
        script = """
import os, socket
import r2m_ray.run.trackers
r2m_ray.run.trackers._START_SECONDS = 2.0
listening = socket.create_server(("127.0.0.1", 0))  # The system accepts; nobody reads.
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}"
with log(root / "run", "online") as kept:
    for t in range(1, 300):
        kept.step(t, {"a": float(t)})
    # Every step is written while W&B is still waiting for its first answer.
    assert not list((root / "run" / "wandb").glob("*run-*"))
os._exit(0)  # W&B's own farewell would wait for the server once more.
"""
        printed, rows = run_wandb(tmp_path, script, WANDB_API_KEY="0123456789" * 4)
        assert [row["a"] for row in rows] == [float(t) for t in range(1, 300)]
        warnings = [line for line in printed.splitlines() if line.startswith("W&B")]
        assert len(warnings) == 1
        assert f"wandb sync {tmp_path}/run/wandb/offline-run-" in warnings[0]
