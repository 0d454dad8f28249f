"""One run, one output folder: a second run that would write into it is refused."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments


logger = logging.getLogger(__name__)

LOCK_NAME = "_lock"  # names with an underscore are not pushed to the Hub
CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without locks

_held: dict[str, int] = {}  # open files by folder. The kernel lets go of them when the process ends, in whatever way


def hold_output_dir(args: TrainingArguments):
    """Make the output folder and hold it until this process ends. The main process does, for all of its run.

    Raises:
        ValueError: in all processes, if another run holds the folder, or it cannot be written.
    """
    error = [hold(args.output_dir) if args.process_index == 0 else None]
    if args.world_size > 1:
        error = broadcast_object_list(error)
    if error[0]:
        raise ValueError(error[0])


def hold(folder: str) -> str | None:
    """Returns what is wrong, or `None`. The lock is flock's: it is gone with its process, also after kill -9."""
    if os.path.realpath(folder) in _held:
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        file = os.open(Path(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        return f"output_dir={folder} cannot be written: {error.strerror}."
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
        os.close(file)
        return (
            f"output_dir={folder} is in use: {holder} trains in it. Wait until it ends, or give another --output_dir."
        )
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        logger.warning(f"output_dir={folder} cannot be locked ({error.strerror}): start no second run in it.")
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        os.close(file)
        return f"output_dir={folder} cannot be written: {error.strerror}."
    _held[os.path.realpath(folder)] = file
    return None
