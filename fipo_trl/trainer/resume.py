"""A run on disk: which checkpoint to go on from, and what TRL forgets in one of the generation at hand."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fipo_trl.trainer.dynamic_sampling import DynamicSampler


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_config import DAPOConfig
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer

logger = get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"  # transformers' name
GENERATION_STATE_NAME = "generation_state_{rank}.pt"


# Checkpoints


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or `None`.

    The trainer's state is written last: without it, a process was killed while it saved.
    """
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    updates = {state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): state.parent for state in states}
    last = max((number for number in updates if number.isdecimal()), key=int, default=None)
    return updates.get(last)


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None, max_steps: int) -> str | None:
    """The checkpoint to resume from. An output folder with the checkpoints of another run is not overwritten.

    Args:
        output_dir, resume_from_checkpoint, max_steps: Of the run's configuration.

    Raises:
        ValueError: if there is no such checkpoint, it has made `max_steps` updates already, or `output_dir` holds
            checkpoints and nothing says what to do with them.
    """
    latest = latest_checkpoint(output_dir)
    wanted = resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if latest:
            raise ValueError(
                f"output_dir={output_dir} holds {latest.name} of an earlier run. Pass --resume_from_checkpoint latest "
                "to go on with it, or another --output_dir."
            )
        return None
    if str(wanted).lower() in ("latest", "true"):
        if latest is None:
            raise ValueError(f"resume_from_checkpoint={wanted}, but output_dir={output_dir} holds no checkpoint.")
        wanted = str(latest)
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint={wanted}: there is no such folder.")
    done = TrainerState.load_from_json(os.path.join(wanted, TRAINER_STATE_NAME)).global_step
    if 0 < max_steps <= done:  # transformers would make one more update
        raise ValueError(f"{wanted} has made {done} of max_steps={max_steps} updates. Raise max_steps.")
    return str(wanted)


# The generation at hand


def generation_layout(args: "DAPOConfig") -> dict[str, int]:
    """What must not change if a generation is to be continued."""
    names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations")
    return {"world_size": args.world_size} | {name: getattr(args, name) for name in names}


def save_generation(trainer: "DAPOTrainer", folder: str):
    """Save where this process stands in its generation, completions still in use, and metrics not yet logged."""
    mid_generation = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    sampler = trainer.dynamic_sampler
    state = {
        "layout": generation_layout(trainer.args),
        "step": trainer._step,
        "buffered_inputs": trainer._buffered_inputs if mid_generation else None,
        "dynamic_sampling": sampler.state_dict() if sampler else None,
        "metrics": {name: list(map(float, values)) for name, values in trainer._metrics["train"].items()},
    }
    os.makedirs(folder, exist_ok=True)  # nodes without a shared file system
    torch.save(state, os.path.join(folder, GENERATION_STATE_NAME.format(rank=trainer.args.process_index)))


def restore_generation(trainer: "DAPOTrainer", checkpoint: str):
    """Restore what [`save_generation`] saved, on all processes or on none, and the order of the prompts."""
    repeat_draws(trainer._train_sampler, epochs=int(trainer.state.epoch))
    path = os.path.join(checkpoint, GENERATION_STATE_NAME.format(rank=trainer.args.process_index))
    state = torch.load(path, map_location="cpu", weights_only=True) if os.path.isfile(path) else None
    # All processes must go on alike: a single one without its state would generate while the others train
    continued = all(gather_object([state is not None and state["layout"] == generation_layout(trainer.args)]))
    if continued:
        trainer._step = state["step"]
        trainer._buffered_inputs = send_to_device(state["buffered_inputs"], trainer.accelerator.device)
        trainer._metrics["train"].update(state["metrics"])
    else:
        logger.warning(
            f"{checkpoint} holds no generation state for these processes and batch layout: the run goes on with a "
            "new generation, and may see other completions than an uninterrupted run."
        )
    if trainer.dynamic_sampler is not None:
        restore_sampler(trainer.dynamic_sampler, state and state["dynamic_sampling"], continued)


def repeat_draws(sampler, epochs: int):
    """Draw the orders of the epochs that are over. TRL's sampler draws one per epoch, and starts anew in each run."""
    if sampler is not None and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def restore_sampler(sampler: DynamicSampler, saved: dict | None, continued: bool):
    """Groups carried over lie on the processes that sampled them: another layout samples their prompts anew."""
    if not continued:
        (saved,) = broadcast_object_list([saved])  # the main process's
        if saved and saved["pool"]:
            saved = saved | {"position": saved["pool"][0]["position"], "pool": []}
    if saved is None or saved["rows"] != sampler.stream.rows:
        logger.warning(
            "The checkpoint was saved without dynamic sampling, or with another dataset: prompts start anew."
        )
        return
    sampler.load_state_dict(saved)
