"""Text that nobody here wrote, made safe to print, and text that may hold a secret, made safe to keep.

Model and user text can carry terminal escapes that move the cursor, or bidirectional controls that
show a line as something else. Whatever is printed or put on a page goes through ``printable``.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence

_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SECRET_NAME = re.compile(
    r"(?i)((api|access|secret|private)[_-]?key|token|secret|passw(or)?d|passphrase|credentials?)$"
)
_ASSIGNMENT = re.compile(r"""([\w.+-]+)([ \t]*[=:][ \t]*)("[^"]*"|'[^']*'|[^\s,}]+)""")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_SHORTEST_SECRET = 8
HIDDEN = "<hidden>"


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
