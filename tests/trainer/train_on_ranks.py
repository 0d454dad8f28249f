"""Train a few updates on however many processes there are, and save what came out. Run by test_several_processes.py.

All completions of a generation go into each update, so that the ranks need not agree with a single process on the
order in which TRL deals them.
"""

import json
import sys
import weakref

import torch
from accelerate import PartialState
from tiny import leave_process_group, longer_is_better, make_trainer, parameters, right_for_some, scored_rollouts


def main(result, output_dir, settings):
    world_size = PartialState(cpu=True).num_processes
    settings = json.loads(settings)
    settings["per_device_train_batch_size"] = settings["per_device_train_batch_size"] // world_size
    keywords = {"rollout_func": scored_rollouts, "reward_funcs": [right_for_some, longer_is_better]}
    trainer = make_trainer(output_dir, keywords=keywords, **settings)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint") == "true")
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history
        torch.save({"world_size": world_size, "parameters": parameters(trainer), "log": log}, result)
    if world_size > 1:
        trainer.accelerator.wait_for_everyone()  # who exits while another still talks to him would abort that one
        wrapped = weakref.ref(trainer.model_wrapped)
        del trainer
        leave_process_group()
        assert wrapped() is None


if __name__ == "__main__":
    main(*sys.argv[1:])
