"""Faults on demand, so that tests can end a process at a known place: never active in a user's run.

``R2M_FAULTS=rollout-0@2:mid_generate:kill,driver@3:save:stop`` reads: the process that plays rollout-0
ends itself by SIGKILL the first time that it reaches the point ``mid_generate`` of step 2. Each fault happens
once, also where its step is computed again; the file ``<number>-<fault>`` in ``R2M_FAULTS_DIR`` proves it.
Without ``R2M_TESTING=1`` such a variable is refused.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

from r2m_ray.errors import InputError

FAULTS, TESTING, EVIDENCE, ACTOR = "R2M_FAULTS", "R2M_TESTING", "R2M_FAULTS_DIR", "R2M_ACTOR"
DRIVER = "driver"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "raise": None}
FAULT = re.compile(
    rf"(?P<actor>[a-z]+(-\d+)?)@(?P<step>\d+|any):(?P<point>[a-z_]+):(?P<action>{'|'.join(SIGNALS)})"
)

_step: int | None = None


def refuse_faults(environment: Mapping[str, str]) -> None:
    """Raise InputError where faults are asked for outside a test, or do not read as faults."""
    asked = environment.get(FAULTS)
    if asked and environment.get(TESTING) != "1":
        raise InputError(f"{FAULTS} is set: it ends processes on purpose, in tests alone; unset it")
    for fault in asked.split(",") if asked else ():
        if not FAULT.fullmatch(fault):
            raise InputError(
                f"{FAULTS}: {fault!r} is not actor@step:point:action with one of {', '.join(SIGNALS)}"
            )


def fault_environment() -> dict[str, str]:
    """The variables by which this process's actors take part in its faults; none in a user's run."""
    return {name: os.environ[name] for name in (FAULTS, TESTING, EVIDENCE) if name in os.environ}


def reach(point: str, step: int | None = None) -> None:
    """Say that this process has come to a point of a step; a fault that was asked for here happens now.

    Without a step it is the one that this process named last. Faults of ``any`` step match always.
    """
    global _step
    _step = _step if step is None else step
    asked = os.environ.get(FAULTS)
    if not asked or os.environ.get(TESTING) != "1":
        return
    here = (os.environ.get(ACTOR, DRIVER), point)
    for number, fault in enumerate(asked.split(",")):
        match = FAULT.fullmatch(fault)
        if not match or match.group("actor", "point") != here or match["step"] not in ("any", str(_step)):
            continue
        evidence = Path(os.environ[EVIDENCE]) / f"{number}-{fault.replace('@', '.').replace(':', '.')}"
        try:
            evidence.touch(exist_ok=False)
        except FileExistsError:
            continue
        ending = SIGNALS[match["action"]]
        if ending is None:
            raise RuntimeError(f"fault {fault}")
        os.kill(os.getpid(), ending)
