"""Train a few updates on however many processes there are. What `cpu_ranks` calls on each.

All completions of a generation go into each update, so that the ranks need not agree with a single process on the
order in which TRL deals them.
"""

import gc
import random
import time

from accelerate import PartialState
from cpu_ranks import held, whole_weights
from tiny import fixed_rollouts, longer_is_better, make_trainer, right_for_some, scored_rollouts


REWARDS = [right_for_some, longer_is_better]


def cases(folder, settings_by_case):
    """One training after another. Returns of each its weights, its log and what this rank held, by name."""
    results = {}
    for name, settings in settings_by_case.items():
        trainer = trainer_of(f"{folder}/{name}", settings)
        trainer.train()
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
    """What is said where a trainer is refused, by name."""
    messages = {}
    for name, settings in settings_by_case.items():
        try:
            trainer_of(f"{folder}/{name}", settings)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def trainer_of(output_dir, settings):
    """A trainer whose batches are `settings`', spread over the processes. Some settings are the rollouts'."""
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
    keywords = {"rollout_func": rollout_func, "reward_funcs": reward_funcs}
    return make_trainer(output_dir, keywords=keywords, **settings)


def long_tailed_rollouts(prompts, trainer):
    """Completions of a few tokens, and here and there of hundreds."""
    rollouts = fixed_rollouts(prompts, trainer)
    for prompt, ids in zip(prompts, rollouts["completion_ids"], strict=True):
        length = min(int(random.Random(f"{prompt} {ids}").paretovariate(0.8) * 2), 380)
        ids[:] = (ids * length)[:length] + [ids[-1]]
    return rollouts
