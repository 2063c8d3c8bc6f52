"""A copy of the metrics on Weights & Biases, made by a thread of its own so that training never waits for it.

Whatever goes wrong there, ``metrics.jsonl`` is complete and the run goes on: one warning says how to
upload the offline copy later. W&B cannot take rows back, so steps that a resumed run computes again
appear there twice, with the same values.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r2m_ray.config.schema import LoggingConfig, WandbMode

_QUEUED_ROWS = 256
_START_SECONDS = 30.0
_CLOSE_SECONDS = 30.0


class WandbMirror:
    """Sends rows to one W&B run, kept below ``directory/wandb``.

    Where the server cannot be reached the run is kept offline instead. ``run_id`` is the same for every
    continuation of a run, which joins their uploads. ``warn`` gets at most one message, from any thread.
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
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_QUEUED_ROWS)
        self._dropped = 0
        self._thread = threading.Thread(target=self._copy, name="wandb", daemon=True)
        self._thread.start()

    def send(self, row: Mapping[str, Any]) -> None:
        """Hand a row over at once; when W&B is hundreds of rows behind, the row is dropped and counted."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float = _CLOSE_SECONDS) -> None:
        """Wait for W&B to take what is left, but not much longer than ``timeout_s``."""
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._warn_once(f"W&B is {_QUEUED_ROWS} rows behind and was left there")
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn_once(f"W&B did not finish within {timeout_s:.0f} s")
        elif self._dropped:
            self._warn_once(f"W&B was too slow for {self._dropped} rows")

    def _copy(self) -> None:
        # Any failure of the service or its client, of whatever type, must leave training alone.
        try:
            run = self._start()
            for row in iter(self._rows.get, None):
                run.log(row)
        except Exception as error:
            self._warn_once(f"W&B stopped ({_first_line(error)})")
            # Rows are still taken off the queue, so that closing always finds room in it.
            while self._rows.get() is not None:
                continue
        else:
            self._finish(run)

    def _finish(self, run: Any) -> None:
        try:
            run.finish()
        except Exception as error:
            self._warn_once(f"W&B did not take every row ({_first_line(error)})")

    def _start(self) -> Any:
        # Only here, so that `logging.wandb=disabled` never pays for the import.
        import wandb

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
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _warn_once(self, reason: str) -> None:
        if self._warned.acquire(blocking=False):
            self._warn(
                f"{reason}. Training and metrics.jsonl are not affected. "
                f"Upload later with: wandb sync {self._sync_target}"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
