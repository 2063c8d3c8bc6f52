"""What an actor's process wrote before it ended, where its log lies on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

LINES = 12
LONGEST = 2**16
"""Bytes read from the end of a log."""


def logs_directory() -> Path:
    """Where Ray keeps the logs of the newest session on this machine."""
    return Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "session_latest" / "logs"


def last_lines(pid: int) -> str:
    """The last lines on a process's standard error, as a paragraph; empty where there are none here."""
    lines: list[str] = []
    for file in sorted(logs_directory().glob(f"worker-*-{pid}.err")):
        try:
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - LONGEST))
                lines += stream.read().decode(errors="replace").splitlines()
        except OSError as error:
            lines.append(f"({file} cannot be read: {error.strerror})")
    told = [line for line in lines if line.strip() and not line.startswith(":")]
    return "".join(["\nIts last lines:", *(f"\n  {line}" for line in told[-LINES:])]) if told else ""
