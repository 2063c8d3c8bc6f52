"""What a user sees when something is wrong: error types with their exit codes, problems, and safe text.

Model and user text can carry terminal escapes that move the cursor, or bidirectional controls that
show a line as something else. Whatever is printed or put on a page goes through ``printable``.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

SHOWN_LENGTH = 120
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SECRET_NAME = re.compile(
    r"(?i)((api|access|secret|private)[_-]?key|token|secret|passw(or)?d|passphrase|credentials?)$"
)
_ASSIGNMENT = re.compile(r"""([\w.+-]+)([ \t]*[=:][ \t]*)("[^"]*"|'[^']*'|[^\s,}]+)""")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_SHORTEST_SECRET = 8
HIDDEN = "<hidden>"


class InputError(Exception):
    """A mistake in configuration or input, found before anything starts; exit code 2.

    The message names the file or field and the remedy.
    """

    exit_code = 2


class RunError(Exception):
    """A failure that the run cannot recover from; exit code 3.

    The message names the actor, the phase and the remedy.
    """

    exit_code = 3


class Loss(StrEnum):
    """How an actor was lost: what the runtime decides by, and what a message may name."""

    died = "died"
    """Its process or its node ended."""
    device = "device"
    """Its device failed, so its process must be replaced."""
    peers = "peers"
    """It lives, but a peer of its collective is gone."""
    silent = "silent"
    """It did not answer before its deadline."""
    record = "record"
    """It lives, but a record that it works on went with another actor or node."""


class ActorLost(RunError):
    """Actors cannot go on with what they were doing; others can do it again.

    Args:
        message: names the actor, the phase and the remedy.
        actors: the names of the actors to replace, such as ``rollout-0``; empty where a record was lost.
        cause: how they were lost.
    """

    def __init__(self, message: str, actors: tuple[str, ...], cause: Loss = Loss.died) -> None:
        super().__init__(message)
        self.actors = actors
        self.cause = cause

    def concerns(self, role: str) -> bool:
        """Whether all of them play this role."""
        return bool(self.actors) and all(name.rpartition("-")[0] == role for name in self.actors)


class DeviceLost(RunError):
    """A device that an engine computes on failed, or one of its worker processes or peers; exit code 3.

    Nothing in the process can be trusted afterwards. Another process can do the same work again, so the
    runtime ends this one and replaces it, as if it had died.
    """


class PeersLost(RunError):
    """A collective failed in a process that lives itself; exit code 3.

    A consequence: one of its peers died, or cannot be reached.
    """


class Alarmed(RunError):
    """An alarm ended the run in order (``monitor.on_alarm=stop``), and its last step is saved; exit code 4.

    The message names the alarms and their remedies.
    """

    exit_code = 4


class Preempted(Exception):
    """The run was asked to stop, and kept its last commit; exit code 75."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    path: the dotted configuration field or the file it is about. message: the value, what is allowed, and the
    remedy. warning: the run may start all the same.
    """

    path: str
    message: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.message)}"


def shown(value: object) -> str:
    """A value as a user would type it, on one line: escaped, and cut where it is long."""
    text = "null" if value is None else str(value)
    text = text.lower() if isinstance(value, bool) else text
    cut = text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}… ({len(text)} characters)"
    return printable(cut)


def hint(word: str, known: Sequence[str]) -> str:
    """The sentence that names the nearest known word; empty where none is near."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def refuse(problems: Iterable[Problem], subject: str) -> None:
    """Raise InputError with every problem that is not a warning; nothing happens if there is none."""
    errors = [problem for problem in problems if not problem.warning]
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise InputError("\n".join([f"{count} in {subject}:", *(f"  {error}" for error in errors)]))


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with control, format, surrogate and separator characters spelled out, ``\\x1b`` for ESC.

    With ``lines`` the newline and the tab stay as they are.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        _spelled(character)
        if unicodedata.category(character) in _UNSAFE_CATEGORIES and character not in kept
        else character
        for character in text
    )


def names_secret(name: str) -> bool:
    """Whether a setting or an environment variable of this name usually holds a secret."""
    return _SECRET_NAME.search(name) is not None


def redacted(text: str) -> str:
    """``text`` without the values of secret-looking settings, environment variables and URL logins."""
    for name, value in os.environ.items():
        if names_secret(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    return _ASSIGNMENT.sub(_hide_secret, text)


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets, those that follow a flag (``--api-key …``) included."""
    before = ["", *arguments]
    return [
        HIDDEN if flag.startswith("-") and names_secret(flag) else redacted(argument)
        for flag, argument in zip(before, arguments, strict=False)
    ]


def _spelled(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _hide_secret(match: re.Match[str]) -> str:
    name, separator, _ = match.groups()
    return f"{name}{separator}{HIDDEN}" if names_secret(name) else match.group()
