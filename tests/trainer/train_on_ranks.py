"""Train a few updates on however many processes there are, and save what came out. Run by test_several_processes.py.

All completions of a generation go into each update, so that the ranks need not agree with a single process on the
order in which TRL deals them.
"""

import json
import sys
import weakref
from pathlib import Path

import torch
from accelerate import PartialState
from tiny import leave_process_group, longer_is_better, make_trainer, parameters, right_for_some, scored_rollouts


def train(folder, settings):
    """One run: `folder/run` is its output, `folder/result` what came out of it. Returns the trainer."""
    folder, world_size = Path(folder), PartialState(cpu=True).num_processes
    settings = settings | {"per_device_train_batch_size": settings["per_device_train_batch_size"] // world_size}
    keywords = {"rollout_func": scored_rollouts, "reward_funcs": [right_for_some, longer_is_better]}
    trainer = make_trainer(folder / "run", keywords=keywords, **settings)
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history
        torch.save({"world_size": world_size, "parameters": parameters(trainer), "log": log}, folder / "result")
    trainer.accelerator.wait_for_everyone()  # who exits while another still talks to him would abort that one
    return trainer


def main(runs):
    """One after the other, as it takes longest to start: `{folder: settings}`."""
    for folder, settings in json.loads(runs).items():
        trainer = train(folder, settings)
    wrapped = weakref.ref(trainer.model_wrapped)
    del trainer
    leave_process_group()
    assert wrapped() is None


if __name__ == "__main__":
    main(*sys.argv[1:])
