"""`fipo-trl train`: start the processes of a training, pass signals on, and return its exit status.

`accelerate launch` does the first alone: it ends with 1 whatever the status of its processes, and a signal that it
gets kills them, or leaves them behind.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file

from fipo_trl.commands.status import INTERRUPTED, STATUS_FILE
from fipo_trl.commands.train_help import launch_parser, show_help
from fipo_trl.recipe.shipped import find_accelerate_config


WORKER = "fipo_trl.commands.train"


def main(arguments: list[str]):
    """Train, and end with the exit status of the training.

    A single process is this one. Several are started by accelerate, by the flags of [`launch_parser`], by the file of
    `accelerate config` if there is one, or on all GPUs of this machine.
    """
    if {"-h", "--help"} & set(arguments):
        show_help()
        return
    options, settings = launch_parser().parse_known_args(arguments)
    if options.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # what `accelerate launch --cpu` sets
    try:
        words = launcher_words(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not words and not os.path.isfile(default_config_file) and (options.cpu or torch.cuda.device_count() < 2):
        from fipo_trl.commands import train

        train.main(settings)
    words += ["--cpu"] if options.cpu and "--config_file" not in words else []
    sys.exit(run([sys.executable, "-m", "accelerate.commands.launch", *words, "--module", WORKER, *settings]))


def launcher_words(options: argparse.Namespace) -> list[str]:
    """What accelerate is told of [`launch_parser`]'s flags, but for `--cpu`.

    Several processes without a GPU need a file that says so: accelerate would start one, without a word.

    Raises:
        ValueError: if there is no such file of accelerate.
    """
    config = options.accelerate_config
    several = options.num_processes not in (None, "1")
    if (
        config is None
        and several
        and (options.cpu or not (torch.cuda.is_available() or os.path.isfile(default_config_file)))
    ):
        config = "two_cpu_processes"  # or as many as `--num_processes` says
    words = [] if config is None else ["--config_file", str(find_accelerate_config(config))]
    for name, value in vars(options).items():
        if name not in ("accelerate_config", "cpu") and value is not None:
            words += [f"--{name}", value]
    return words


def run(command: list[str]) -> int:
    """Run accelerate and pass signals on to the processes of the training, not to accelerate, which would kill them.

    Returns:
        The exit status of the training.
    """
    signalled = False
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder, "status")
        environment = os.environ | {STATUS_FILE: str(status_file)}
        process = subprocess.Popen(command, env=environment, start_new_session=True)

        def pass_on(number, frame):
            nonlocal signalled
            signalled = True
            there = workers(process.pid)
            for worker in there:
                worker.send_signal(number)
            if not there:  # none has been started yet
                process.terminate()

        handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if status_file.exists():
            return int(status_file.read_text())
    return INTERRUPTED if signalled else status


def workers(launcher: int) -> list[psutil.Process]:
    """The processes of the training: children of accelerate. Their own children, such as engines, are theirs."""
    found = []
    try:
        for child in psutil.Process(launcher).children():
            if WORKER in child.cmdline():
                found.append(child)
    except psutil.NoSuchProcess:
        pass
    return found
