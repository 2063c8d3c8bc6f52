"""Problems found before a run starts: collected, then reported all at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from r2m_ray.errors import InputError
from r2m_ray.escape import printable

SHOWN_LENGTH = 120


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
