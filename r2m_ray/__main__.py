"""The command line, `r2m-ray` or ``python -m r2m_ray``.

Exit codes: 0 done, 2 bad configuration or input, 3 the run failed, 4 an alarm ended it, 75 stopped by a
signal and resumable, 130 interrupted elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from r2m_ray import __version__
from r2m_ray.cli.commands import COMMANDS
from r2m_ray.cli.hydra_main import complete
from r2m_ray.engines.faults import refuse_faults
from r2m_ray.errors import InputError, Preempted, RunError, hint, printable, redacted

INTERRUPTED = 130


def usage() -> str:
    """The help of `r2m-ray` itself."""
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: r2m-ray COMMAND …",
            "",
            "RLHF with a reward model that reads the policy's hidden states and moves with it (R2M).",
            "",
            *lines,
            "",
            "`r2m-ray COMMAND --help` explains a command.",
        ]
    )


def dispatch(arguments: Sequence[str]) -> int:
    """Run a command line; raises InputError and RunError as the command does."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else InputError.exit_code
    if arguments[0] == "--version":
        print(f"r2m-ray {__version__}")
        return 0
    if arguments[0] in ("-sc", "--shell-completion"):
        return complete(arguments, [*COMMANDS])
    name = arguments[0]
    if name not in COMMANDS:
        raise InputError(
            f"{name}: no such command; there are {', '.join(COMMANDS)}.{hint(name, [*COMMANDS])}"
        )
    return COMMANDS[name].run(arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; a mistake is a few lines, not a traceback."""
    try:
        refuse_faults(os.environ)
        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except (InputError, RunError) as error:
        print(f"error: {printable(redacted(str(error)), lines=True)}", file=sys.stderr)
        return error.exit_code
    except Preempted as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
