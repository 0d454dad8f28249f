"""A signal becomes a checkpoint and the end of training."""

import signal
import sys

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Turns SIGINT (Ctrl-C) and SIGTERM (a job scheduler) into: finish this update, save a checkpoint, stop.

    The signal must reach the training processes. torchrun kills them 30 s after it got one itself. A second Ctrl-C
    ends a single process at once; several it does not, because launchers pass on what the terminal has already sent.
    """

    def __init__(self):
        self.requested = False  # on this process
        self.stopped = False  # agreed by all processes

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def on_train_end(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _request(self, number, frame):
        if self.requested and not torch.distributed.is_initialized():
            raise KeyboardInterrupt
        if not self.requested:
            print("\nStopping after this update, and saving a checkpoint ...", file=sys.stderr, flush=True)
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor(float(self.requested), device=args.device)
        if torch.distributed.is_initialized():  # all processes must stop at the same update
            torch.distributed.all_reduce(requested)
        if requested.item():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
