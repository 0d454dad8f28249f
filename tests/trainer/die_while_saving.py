"""Train, and die by kill -9 in the middle of the save at an update. Run by test_checkpoints.py.

`part` names what is being written then: the file of torch.save that is left half written, or the manifest.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny import make_trainer


def main(output_dir, update, part, settings):
    trainer = make_trainer(output_dir, **settings)
    save, replace = torch.save, Path.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        if trainer.state.global_step == update and os.path.basename(path) == part:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def replace_never(path, target):
        if trainer.state.global_step == update and Path(target).name == part:
            die()
        return replace(path, target)

    torch.save, Path.replace = save_half, replace_never
    trainer.train()


if __name__ == "__main__":
    output_dir, update, part = sys.argv[1:]
    from test_checkpoints import SETTINGS

    main(output_dir, int(update), part, SETTINGS)
