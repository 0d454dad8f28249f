"""A run that fails leaves a checkpoint of its last update, from which it goes on as if nothing had happened.

The weights and the optimizer change in an update only. What else moves on within one, until something fails (random
numbers, place in the generation, metrics, the order of prompts), is remembered at the end of each update.
"""

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch.distributed import distributed_c10d
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fipo_trl.trainer.reward_calls import GenerationGivenUp


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer

AGREEMENT = 60  # seconds in which all processes must have failed
SAVING = 3600  # seconds in which all must have saved

FAILURES = itertools.count()  # of this process; of all, where all fail

logger = get_logger(__name__)


class LastUpdate(TrainerCallback):
    """What a trainer was at the end of its last update, beside the weights and the optimizer.

    It costs no copy of tensors on a device: the completions in use are referred to, the rest is small.
    """

    def __init__(self, trainer: "DAPOTrainer"):
        self.trainer = trainer
        self.moment: dict[str, Any] = {}
        self._begun: int | None = None  # updates made when an optimizer step began, which may not have ended
        self._saved: int | None = None  # update of the last checkpoint
        self._saving = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = None
        self._saved = state.global_step  # by the checkpoint that it resumes from; 0: there is nothing to save
        self.remember()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._begun = state.global_step

    def remember(self):
        """Called at the end of an update, when all that belongs to it is done."""
        trainer, args = self.trainer, self.trainer.args
        sampler = trainer.dynamic_sampler
        self.moment = {
            "update": trainer.state.global_step,
            "random": random_states(args.device),
            "step": trainer._step,
            "buffered_inputs": trainer._buffered_inputs if trainer.inside_generation else None,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "tokens_seen": trainer.state.num_input_tokens_seen,
            "entropy": (trainer.entropy_coef, trainer._last_world_entropy),
            "dynamic_sampling": sampler and sampler.state_dict(),
        }

    def go_back(self):
        """Make the trainer what it was. After an update that ended, and failed in what follows, there is no way back.

        That is a callback, an evaluation or a log: the trainer then stands where a resumed run goes on.
        """
        trainer, moment = self.trainer, self.moment
        if moment["update"] != trainer.state.global_step:
            if trainer._globalstep_last_logged == trainer.state.global_step:
                trainer._metrics["train"].clear()  # TRL does so when all have taken note of what it logs
            return
        set_random_states(moment["random"], trainer.args.device)
        trainer._step, trainer._buffered_inputs = moment["step"], moment["buffered_inputs"]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(moment["metrics"])
        trainer.state.num_input_tokens_seen = moment["tokens_seen"]
        trainer.entropy_coef, trainer._last_world_entropy = moment["entropy"]
        if trainer.dynamic_sampler is not None:
            trainer.dynamic_sampler.load_state_dict(moment["dynamic_sampling"])

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While the trainer saves a checkpoint: what fails in there is not saved once more."""
        self._saving = True
        yield
        self._saving, self._saved = False, self.trainer.state.global_step

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """While the trainer trains: an exception saves a checkpoint, and goes on.

        Ctrl-C does not, as ever, but for the second signal in a reward. On several processes all must fail in the same
        update within a minute, as they do when a reward fails on one (`RewardCalls.finish`), or none saves: a
        checkpoint of some would be none, and the others may wait for this process for good.
        """
        self._saving, self._begun = False, None
        self.moment = {}
        try:
            yield
        except (Exception, GenerationGivenUp) as error:
            try:
                self._save(error)
            except Exception as failed:
                logger.error(f"No checkpoint was saved of update {self.trainer.state.global_step}: {failed!r}")
            raise

    def _save(self, error: BaseException):
        trainer, args = self.trainer, self.trainer.args
        update, given_up = trainer.state.global_step, isinstance(error, GenerationGivenUp)
        if self._saving or not self.moment:
            return
        if update == 0:
            if given_up:
                logger.error("The generation at hand is given up before the first update: there is nothing to save.")
            return
        folder = os.path.join(trainer._get_output_dir(trial=None), f"{PREFIX_CHECKPOINT_DIR}-{update}")
        what = "The generation at hand is given up" if given_up else f"Training failed ({type(error).__name__})"
        reason = None
        if args.save_strategy == "no" and not given_up:
            reason = "save_strategy is 'no'"
        elif self._begun == update:
            reason = "it failed within the optimizer's step, and left the weights between two updates"
        number = next(FAILURES)
        if not all_there(f"failure {number}", f"{update} {reason}", AGREEMENT):
            reason = "not all processes failed"
        if reason is not None:
            logger.error(f"{what} after update {update}. No checkpoint was saved of it: {reason}.")
            return
        if self._saved != update:
            self.go_back()
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
            trainer.control = trainer.callback_handler.on_save(args, trainer.state, trainer.control)
            all_there(f"saved {number}", "", SAVING)  # torchrun kills the others when one process ends
        elif not os.path.isdir(folder):  # the run goes on from one elsewhere, and has made no update
            return
        if args.save_only_model:
            logger.error(f"{what} after update {update}. The model of that update is in {folder}.")
        else:
            logger.error(
                f"{what} after update {update}. The checkpoint of that update is {folder}: the same command with "
                "--resume_from_checkpoint latest (in a script: trainer.train(resume_from_checkpoint=True)) goes on "
                "from there."
            )


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the random number generators that a checkpoint holds. They lie on the CPU, those of a GPU too."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device):
    """The inverse of [`random_states`]."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


def all_there(place: str, word: str, seconds: float) -> bool:
    """Whether all processes come to this place with the same word. A wait that ends, which a collective's may not."""
    if not torch.distributed.is_initialized():
        return True
    store = distributed_c10d._get_default_store()
    keys = [f"fipo_trl {place} {rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[torch.distributed.get_rank()], word)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError: time is up
        return False
    return all(store.get(key).decode() == word for key in keys)
