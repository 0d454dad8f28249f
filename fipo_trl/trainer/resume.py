"""A run on disk: which checkpoint to go on from, and what TRL forgets in one of the generation at hand."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fipo_trl.trainer.dynamic_sampling import DynamicSampler
from fipo_trl.trainer.manifest import MANIFEST_NAME, TRAINER_STATE_NAME, describe, faults, reference_is_missing


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_config import DAPOConfig
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer

logger = get_logger(__name__)
plain_logger = logging.getLogger(__name__)  # before there is anything that accelerate's could ask for the rank

GENERATION_STATE_NAME = "generation_state_{rank}.pt"

# On several CPU processes transformers loads the optimizer to a device `cpu:0`, a place that torch does not know
torch.serialization.register_package(
    9, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


# Checkpoints


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal():  # not somebody's own
            found[int(number)] = folder
    return [found[number] for number in sorted(found, reverse=True)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or `None`. Those passed over are named in the log."""
    for folder in checkpoints(output_dir):
        found = faults(folder)
        if not found:
            return folder
        plain_logger.warning(f"{folder} is passed over, it is not whole: {describe(found)}.")
    return None


def latest_state(output_dir: str | Path) -> Path | None:
    """The trainer_state.json of the newest checkpoint that has one, or `None`. To look at a run, not to go on."""
    states = (folder / TRAINER_STATE_NAME for folder in checkpoints(output_dir))
    return next((state for state in states if state.is_file()), None)


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None, max_steps: int) -> str | None:
    """The checkpoint to resume from. An output folder with the checkpoints of another run is not overwritten.

    `"latest"` is the newest that is whole; without one, the run starts anew. One that has made all updates is gone on
    from, too: a run that was killed before it saved its model saves it then.

    Args:
        output_dir, resume_from_checkpoint, max_steps: Of the run's configuration.

    Raises:
        ValueError: if there is no such checkpoint, it is not whole, it has made more than `max_steps` updates, or
            `output_dir` holds checkpoints and nothing says what to do with them.
    """
    wanted = resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if latest := latest_checkpoint(output_dir):
            raise ValueError(
                f"output_dir={output_dir} holds {latest.name} of an earlier run. Pass --resume_from_checkpoint latest "
                "to go on with it, or another --output_dir."
            )
        return None
    if str(wanted).lower() in ("latest", "true"):
        latest = latest_checkpoint(output_dir)
        if latest is None:
            whole = "whole " if checkpoints(output_dir) else ""
            plain_logger.warning(f"output_dir={output_dir} holds no {whole}checkpoint: the run starts anew.")
            return None
        wanted = str(latest)
    wanted = str(wanted)
    check_whole(wanted)
    done = TrainerState.load_from_json(os.path.join(wanted, TRAINER_STATE_NAME)).global_step
    if 0 < max_steps < done:
        raise ValueError(f"{wanted} has made {done} of max_steps={max_steps} updates. Raise max_steps.")
    if done == max_steps:
        plain_logger.warning(
            f"{wanted} has made all of max_steps={max_steps} updates: its model is saved, and none is made. Raise "
            "max_steps to train on."
        )
    return wanted


def check_whole(checkpoint: str | Path, but: tuple[str, ...] = ()):
    """Args:
        but: Names of files that may be missing.

    Raises:
        ValueError: if there is no such folder, or it is not whole.
    """
    if not os.path.isdir(checkpoint):
        raise ValueError(f"resume_from_checkpoint={checkpoint}: there is no such folder.")
    found = {name: what for name, what in faults(checkpoint).items() if name not in but or what != "is missing"}
    if found:
        raise ValueError(f"resume_from_checkpoint={checkpoint} is not whole: {describe(found)}.")
    if not Path(checkpoint, MANIFEST_NAME).is_file():
        plain_logger.warning(
            f"{checkpoint} has no {MANIFEST_NAME}: TRL saved it, or an older version of this package. Its files are "
            "there, but neither their sizes nor the settings of its run can be compared."
        )


def resolve(trainer: "DAPOTrainer", resume_from_checkpoint: str | bool | None) -> str | None:
    """What `trainer.train` was asked to resume from, as a folder on which all processes agree.

    A generation state may be missing: [`restore_generation`] says what that means.

    Raises:
        ValueError: if there is no such checkpoint, it is not whole, or processes see different ones.
    """
    checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
    if resume_from_checkpoint is True:
        latest = latest_checkpoint(trainer.args.output_dir)
        if latest is None:
            raise ValueError(f"No valid checkpoint found in output directory ({trainer.args.output_dir})")
        checkpoint = str(latest)
    names = gather_object([checkpoint and os.path.basename(os.path.normpath(checkpoint))])
    if len(set(names)) > 1:
        raise ValueError(f"The processes would resume from different checkpoints: {', '.join(map(str, names))}.")
    if checkpoint is not None:
        ranks = range(trainer.args.world_size)
        check_whole(checkpoint, but=tuple(GENERATION_STATE_NAME.format(rank=rank) for rank in ranks))
    return checkpoint


# The generation at hand


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """While a checkpoint is loaded: trained weights keep their dtypes.

    PEFT makes float32 of any adapter that it loads. TRL trains one in bfloat16 where the base is in 4 or 8 bits.
    """
    before = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if weight.dtype != before.get(name, weight.dtype):
            weight.data = weight.data.to(before[name])


def generation_layout(args: "DAPOConfig") -> dict[str, int]:
    """What must not change if a generation is to be continued."""
    names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations")
    return {"world_size": args.world_size} | {name: getattr(args, name) for name in names}


def save_generation(trainer: "DAPOTrainer", folder: str):
    """Save where this process stands in its generation, completions still in use, and metrics not yet logged."""
    sampler = trainer.dynamic_sampler
    state = {
        "layout": generation_layout(trainer.args),
        "step": trainer._step,
        "buffered_inputs": trainer._buffered_inputs if trainer.inside_generation else None,
        "dynamic_sampling": sampler.state_dict() if sampler else None,
        "metrics": {name: list(map(float, values)) for name, values in trainer._metrics["train"].items()},
    }
    os.makedirs(folder, exist_ok=True)  # nodes without a shared file system
    torch.save(state, os.path.join(folder, GENERATION_STATE_NAME.format(rank=trainer.args.process_index)))


def restore_generation(trainer: "DAPOTrainer", checkpoint: str):
    """Restore what [`save_generation`] saved, on all processes or on none, and the order of the prompts."""
    repeat_draws(trainer._train_sampler, epochs=int(trainer.state.epoch))
    path = os.path.join(checkpoint, GENERATION_STATE_NAME.format(rank=trainer.args.process_index))
    state: Any = torch.load(path, map_location="cpu", weights_only=True) if os.path.isfile(path) else None
    # All processes must go on alike: a single one without its state would generate while the others train
    continued = all(gather_object([state is not None and state["layout"] == generation_layout(trainer.args)]))
    if continued:
        buffered = state["buffered_inputs"]
        if trainer.beta != 0 and buffered and "ref_per_token_logps" not in buffered[0]:
            raise ValueError(f"The run cannot go on from {checkpoint}. {reference_is_missing(trainer.beta)}")
        trainer._step = state["step"]
        trainer._buffered_inputs = send_to_device(buffered, trainer.accelerator.device)
        trainer._metrics["train"].update(state["metrics"])
    else:
        logger.warning(
            f"{checkpoint} holds no generation state for these processes and batch layout: the run goes on with a "
            "new generation, and may see other completions than an uninterrupted run."
        )
    if trainer.dynamic_sampler is not None:
        other_data = trainer._changes is not None and bool(trainer._changes.data)
        restore_sampler(trainer.dynamic_sampler, state and state["dynamic_sampling"], continued, other_data)


def repeat_draws(sampler, epochs: int):
    """Draw the orders of the epochs that are over. TRL's sampler draws one per epoch, and starts anew in each run."""
    if sampler is not None and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def restore_sampler(sampler: DynamicSampler, saved: dict | None, continued: bool, other_data: bool):
    """Groups carried over lie on the processes that sampled them: another layout samples their prompts anew.

    Prompts are known by their row, so nothing that is known of those of other data is kept.
    """
    if not continued:
        (saved,) = broadcast_object_list([saved])  # the main process's
        if saved and saved["pool"]:
            saved = saved | {"position": saved["pool"][0]["position"], "pool": []}
    if saved is None or other_data or saved["rows"] != sampler.stream.rows:
        logger.warning(
            "The checkpoint was saved without dynamic sampling, or with another dataset: prompts start anew."
        )
        return
    sampler.load_state_dict(saved)
