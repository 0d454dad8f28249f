"""A signal becomes a checkpoint and the end of training."""

import os
import signal
import sys
import time

import psutil
import torch
from transformers import TrainerCallback

from fipo_trl.trainer.reward_calls import RUNNING, give_up


AGAIN = 1.0  # seconds between two signals that are two, not one that launchers pass on


class StopOnSignal(TrainerCallback):
    """Turns SIGINT (Ctrl-C) and SIGTERM (a job scheduler) into: finish this update, save a checkpoint, stop.

    So does the end of the launcher (accelerate or torchrun) that started this process: nobody is left to stop it.

    The signal must reach the training processes. torchrun kills them 30 s after it got one itself. A second one in a
    reward function gives up the generation: [`GenerationGivenUp`] is raised, and [`DAPOTrainer`] saves a checkpoint of
    the last update. Elsewhere it ends a single process at once; several it does not, because launchers pass on what
    the terminal has already sent.
    """

    def __init__(self):
        self.requested = False  # on this process
        self.stopped = False  # agreed by all processes
        self._first = 0.0  # when it was requested
        self._launcher = launcher_of_this_process()

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def on_train_end(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _request(self, number, frame):
        several = torch.distributed.is_initialized()
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            say("Stopping after this update, and saving a checkpoint ...")
            if RUNNING:
                say(
                    f"This process is {RUNNING[0]}. A second signal gives up the generation, and saves a checkpoint "
                    "of the last update."
                )
        elif RUNNING:
            if not several or time.monotonic() - self._first > AGAIN:
                say(f"Giving up the generation, {RUNNING[0]} ...")
                give_up()
        elif not several:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if self._launcher is not None and os.getppid() != self._launcher and not self.requested:
            self.requested = True
            say("The launcher is gone. Stopping, and saving a checkpoint ...")
        requested = torch.tensor(float(self.requested), device=args.device)
        if torch.distributed.is_initialized():  # all processes must stop at the same update
            torch.distributed.all_reduce(requested)
        if requested.item():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


def launcher_of_this_process() -> int | None:
    """The process id of the parent, if that is a launcher, which waits for this process as long as it lives."""
    parent = os.getppid()
    try:
        words = " ".join(psutil.Process(parent).cmdline())
    except psutil.Error:
        return None
    return parent if any(name in words for name in ("accelerate", "torchrun", "torch.distributed")) else None


def say(text: str):
    print(f"\n{text}", file=sys.stderr, flush=True)
