"""The state of a run on disk: which checkpoint is whole, and what TRL forgets of a generation."""

import os
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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
