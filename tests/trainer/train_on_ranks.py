"""Train a few updates on however many processes there are. What `cpu_ranks` calls on each.

All completions of a generation go into each update, so that the ranks need not agree with a single process on the
order in which TRL deals them.
"""

import gc
import os
import random
import signal
import time

from accelerate import PartialState
from accelerate.utils import merge_fsdp_weights
from cpu_ranks import held, whole_weights
from peft import LoraConfig
from tiny import fixed_rollouts, longer_is_better, make_trainer, right_for_some, scored_rollouts
from transformers import TrainerCallback

from fipo_trl.commands import train as train_command


REWARDS = [right_for_some, longer_is_better]


class Die(TrainerCallback):
    """Of the last process, when an update begins: as if its machine had lost power."""

    def __init__(self, updates):
        self.updates = updates  # that are made

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.updates and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def cases(folder, settings_by_case):
    """One training after another. Returns of each its weights, its log and what this rank held, by name."""
    results = {}
    for name, settings in settings_by_case.items():
        settings = dict(settings)
        resume, die_after = settings.pop("resume", None), settings.pop("die_after", None)
        trainer = trainer_of(f"{folder}/{name}", settings)
        if die_after is not None:
            trainer.add_callback(Die(die_after))
        trainer.train(resume_from_checkpoint=resume)
        results[name] = {
            "weights": whole_weights(trainer),
            "log": trainer.state.log_history,
            "held": held(trainer),
            "world_size": trainer.args.world_size,
        }
        trainer.accelerator.wait_for_everyone()
        del trainer
        gc.collect()
    return results


def refusals(folder, settings_by_case):
    """What is said where a trainer is refused, or its checkpoint, by name."""
    messages = {}
    for name, settings in settings_by_case.items():
        try:
            settings = dict(settings)
            resume = settings.pop("resume", None)
            trainer = trainer_of(f"{folder}/{name}", settings)
            if resume:
                trainer.train(resume_from_checkpoint=resume)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def trainer_of(output_dir, settings):
    """A trainer whose batches are `settings`', spread over the processes. Some settings are not the config's."""
    settings = dict(settings)
    world_size = PartialState(cpu=True).num_processes
    settings["per_device_train_batch_size"] = settings["per_device_train_batch_size"] // world_size
    rollouts = long_tailed_rollouts if settings.pop("long_tailed", False) else scored_rollouts
    late = settings.pop("late", 0)

    def rollout_func(prompts, trainer):
        if trainer.accelerator.process_index == world_size - 1:
            time.sleep(late)
        return rollouts(prompts, trainer)

    reward_funcs = [settings.pop("reward_model")] if "reward_model" in settings else REWARDS
    keywords = {"reward_funcs": reward_funcs}
    if not settings.pop("sampled", False):
        keywords["rollout_func"] = rollout_func
    if settings.pop("lora", False):
        keywords["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    return make_trainer(output_dir, keywords=keywords, **settings)


def merge(checkpoint, folder):
    """`accelerate merge-weights checkpoint folder`."""
    merge_fsdp_weights(checkpoint, folder)


def command(arguments):
    """`fipo-trl train`, but for the end of its process. Returns its exit status, and what this rank held."""
    recipe, trainer, checkpoint = train_command.prepare(arguments)
    return {"status": train_command.train(trainer, recipe, checkpoint), "held": held(trainer)}


def long_tailed_rollouts(prompts, trainer):
    """Completions of a few tokens, and here and there of hundreds."""
    rollouts = fixed_rollouts(prompts, trainer)
    for prompt, ids in zip(prompts, rollouts["completion_ids"], strict=True):
        length = min(int(random.Random(f"{prompt} {ids}").paretovariate(0.8) * 2), 380)
        ids[:] = [*(ids * length)[:length], ids[-1]]
    return rollouts
