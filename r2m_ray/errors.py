"""The errors a user meets, and the exit code each one means."""

from __future__ import annotations


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
