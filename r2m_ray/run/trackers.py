"""A copy of the metrics on Weights & Biases. A thread of its own sends it, so training never waits.

Whatever fails there, ``metrics.jsonl`` is complete and the run goes on. A row counts as sent once W&B has
finished the start that sent it (``wandb/sent.jsonl`` names the last such row). The first row of a later start
also sends all rows between, from ``metrics.jsonl``. So W&B can get a row twice, with one step and one value.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from r2m_ray.config.schema import LoggingConfig, WandbMode
from r2m_ray.run.files import METRICS_FILE, Record, read_steps, replace_file
from r2m_ray.run.vocabulary import current_row

SENT_FILE = Path("wandb", "sent.jsonl")
_HEADER = {"step", "kind", "nonfinite"}
_QUEUE_SIZE = 256
_START_SECONDS = 30.0
_CLOSE_SECONDS = 30.0
_SERVICE = "WANDB_SERVICE"


class WandbMirror:
    """Sends rows to one W&B run, kept below ``directory/wandb``.

    Where the server cannot be reached, the run is kept offline instead. ``run_id`` is the same for every
    start of a run, which joins their uploads. ``warn`` gets at most one message, from any thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        logging: LoggingConfig,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._directory, self._logging = directory, logging
        self._name, self._run_id, self._config = name, run_id, config
        self._warn, self._warned = warn, threading.Lock()
        self._sync_target = directory / "wandb" / "offline-run-*"
        self._rows: queue.Queue[list[Record] | None] = queue.Queue(_QUEUE_SIZE)
        sent = read_steps(directory / SENT_FILE) if (directory / SENT_FILE).exists() else []
        self._given = _order(sent[-1]) if sent else (-1, False)
        self._behind = True
        self._thread = threading.Thread(target=self._copy, name="wandb", daemon=True)
        self._thread.start()

    def send(self, row: Record) -> None:
        """Hand over a row that ``metrics.jsonl`` already holds, and return at once.

        A row that W&B has is left out. While the queue is full, rows wait in the file for a later call.
        """
        if self._rows.full():
            self._behind = True
        else:
            self._hand_over([row])

    def close(self, timeout_s: float = _CLOSE_SECONDS) -> None:
        """Wait until W&B has taken the rest, but not much longer than ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        try:
            self._hand_over([], timeout_s)
            self._rows.put(None, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            self._warn_once(f"W&B is over {_QUEUE_SIZE} rows behind after {timeout_s:.0f} s")
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn_once(f"W&B did not finish within {timeout_s:.0f} s")

    def _hand_over(self, rows: Iterable[Record], timeout_s: float = 0.0) -> None:
        if self._behind:
            rows = read_steps(self._directory / METRICS_FILE)
        new = [row for row in rows if _order(row) > self._given]
        if new:
            self._rows.put(new, timeout=timeout_s)
            self._given = _order(new[-1])
        self._behind = False

    def _copy(self) -> None:
        # Any failure of the service or its client, of whatever type, must leave training alone.
        last: Record | None = None
        try:
            run = self._start()
            for rows in iter(self._rows.get, None):
                for last in rows:
                    run.log(_tracked(last), step=last["step"])
        except Exception as error:
            self._warn_once(f"W&B stopped ({_first_line(error)})")
            # Rows are still taken off the queue, so that closing always finds room in it.
            while self._rows.get() is not None:
                continue
            return
        try:
            run.finish()
            if last is not None:
                sent = {"step": last["step"], "kind": last["kind"]}
                replace_file(self._directory / SENT_FILE, json.dumps(sent) + "\n")
        except Exception as error:
            self._warn_once(f"W&B did not take every row ({_first_line(error)})")

    def _start(self) -> Any:
        # Only here, so that `logging.wandb=disabled` never pays for the import.
        import wandb

        if _SERVICE not in os.environ:
            os.environ[_SERVICE] = _detached_service()
        wandb.setup(settings=wandb.Settings(silent=True))
        if self._logging.wandb is WandbMode.online:
            try:
                # W&B itself would ask on the terminal, under the live panel.
                if not wandb.login(prompt=False):
                    raise PermissionError("no API key: set WANDB_API_KEY or run `wandb login`")
                return self._init(wandb, "online")
            except Exception as error:
                self._warn_once(f"W&B is not reachable and keeps this run offline ({_first_line(error)})")
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            init_timeout=_START_SECONDS,
            finish_timeout=_CLOSE_SECONDS / 2,
            finish_timeout_raises=True,
        )
        run = wandb.init(
            mode=mode,
            dir=self._directory,
            project=self._logging.wandb_project,
            name=self._name,
            id=self._run_id,
            resume="allow",
            config=self._config,
            settings=settings,
        )
        self._sync_target = Path(run.settings.sync_dir)
        return run

    def _warn_once(self, reason: str) -> None:
        if self._warned.acquire(blocking=False):
            self._warn(
                f"{reason}. Training and metrics.jsonl are not affected. The next start of this run sends "
                f"the rows that W&B misses. To upload what it has: wandb sync {self._sync_target}"
            )


def _detached_service() -> str:
    """Start W&B's service as no child of this process; returns the address for ``WANDB_SERVICE``.

    Ray stops a job by a signal to the driver and all its descendants. A service among them ends at once and
    takes along the rows that it has not yet written. This one ends by itself, once it has no client.
    """
    command = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", "30s"]
    started = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        timeout=_START_SECONDS,
        start_new_session=True,
    )
    return started.stdout.strip()


def _order(row: Record) -> tuple[int, bool]:
    """A row's place in ``metrics.jsonl``: an evaluation comes after the step that it follows."""
    return row["step"], row["kind"] == "eval"


def _tracked(row: Record) -> dict[str, Any]:
    """What W&B shows of a row. Its table has one row for each step, so an evaluation's keys get a prefix."""
    prefix = "eval/" if row["kind"] == "eval" else ""
    values = {name: value for name, value in row.items() if name not in _HEADER and value is not None}
    return {f"{prefix}{name}": value for name, value in current_row(values).items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
