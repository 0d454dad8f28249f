"""How a command ends, for who started it."""

import os
import sys
from typing import NoReturn


# Exit statuses of a run that saved a checkpoint and stopped
INTERRUPTED = 130  # by a signal
COLLAPSED = 3  # by the collapse alarm
STATUS_FILE = "FIPO_TRL_STATUS_FILE"  # of the environment: where a launcher wants the exit status to be written


def end(status: int) -> NoReturn:
    """End the process: with this exit status, or with 0 where a launcher reads the status from a file."""
    if path := os.environ.get(STATUS_FILE):
        if is_first_of_machine():
            with open(path, "w") as file:
                file.write(str(status))
        status = 0
    sys.exit(status)


def refuse(message: str) -> NoReturn:
    """Raise what a command prints as one line. As `ArgumentParser.error` it leaves out the usage.

    Raises:
        ValueError: always.
    """
    raise ValueError(message)


def is_first_of_machine() -> bool:
    """Whether this is the first of the processes that accelerate started here, or the only one."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
