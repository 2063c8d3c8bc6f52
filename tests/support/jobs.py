"""A job that worker processes of a launcher can import."""

from __future__ import annotations

import os
from pathlib import Path

from r2m_ray.config.schema import Config


def record_job(config: Config) -> None:
    """Leave the process id under the name of the run."""
    Path(f"{config.run.name}.pid").write_text(str(os.getpid()))
