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


class ActorLost(RunError):
    """Actors died, or did not answer before a deadline; what they were doing can be done again by others.

    actors: their names, such as ``rollout-0``.
    """

    def __init__(self, message: str, actors: tuple[str, ...]) -> None:
        super().__init__(message)
        self.actors = actors

    def concerns(self, role: str) -> bool:
        """Whether all of them play this role."""
        return bool(self.actors) and all(name.rpartition("-")[0] == role for name in self.actors)


class Alarmed(RunError):
    """An alarm ended the run in order (``monitor.on_alarm=stop``), and its last step is saved; exit code 4.

    The message tells the alarms and their remedies.
    """

    exit_code = 4


class Preempted(Exception):
    """The run was told to stop, and kept its last commit; exit code 75."""

    exit_code = 75
