"""Train a language model with FIPO, or with DAPO on the same recipe as the control arm: what each process runs.

    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml
    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml --trainer dapo --output_dir outputs/dapo

`fipo-trl train` starts this, see `launch.py`.
"""

import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from fipo_trl.commands.status import COLLAPSED, INTERRUPTED, end, is_first_of_machine
from fipo_trl.commands.train_help import show_help
from fipo_trl.recipe.read import read
from fipo_trl.recipe.validate import Recipe, validate


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer


def train(trainer: "DAPOTrainer", recipe: Recipe, checkpoint: str | None) -> int:
    """Train, and save the model with its card and `trainer_state.json`, from which reports are drawn.

    Returns:
        The exit status: 0 if training ran to its end, else `INTERRUPTED` or `COLLAPSED`. Then the checkpoint is its
        last word.

    Raises:
        Exception: what failed; the trainer has saved a checkpoint of its last update, see `trainer/last_update.py`.
    """
    from fipo_trl.analysis.collapse import CollapseAlarm
    from fipo_trl.trainer.reward_calls import GenerationGivenUp
    from fipo_trl.trainer.stop_on_signal import StopOnSignal

    output_dir, dataset_name = trainer.args.output_dir, recipe.run.dataset_name
    stop_on_signal, alarm = StopOnSignal(), CollapseAlarm(recipe.run.on_collapse)
    trainer.add_callback(stop_on_signal)
    trainer.add_callback(alarm)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except GenerationGivenUp:  # by a second signal; the trainer has said where its checkpoint is
        return INTERRUPTED
    trainer.accelerator.wait_for_everyone()  # torchrun kills who still writes a checkpoint when another process exits
    if stop_on_signal.stopped:
        trainer.accelerator.print(
            f"Stopped at update {trainer.state.global_step}, with a checkpoint in {output_dir}. The same command with "
            "--resume_from_checkpoint latest goes on from there."
        )
        return INTERRUPTED
    if alarm.stopped:
        trainer.accelerator.print(
            f"Stopped at update {trainer.state.global_step} because on_collapse is 'stop': {alarm.stopped}. The "
            f"checkpoints are in {output_dir}; start from one before update {alarm.stopped.dual_clip_update}."
        )
        return COLLAPSED
    gather_last_save(trainer)
    trainer.save_model(output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Trained for {trainer.state.global_step} updates. The model is in {output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    return 0


def gather_last_save(trainer: "DAPOTrainer"):
    """The last model is for `from_pretrained`, also where checkpoints have weights as shards only: with FSDP's
    `SHARDED_STATE_DICT`, and with ZeRO-3's `zero3_save_16bit_model: false`."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    elif trainer.is_deepspeed_enabled:
        trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True


def prepare(arguments: list[str]) -> tuple[Recipe, "DAPOTrainer", str | None]:
    """The recipe, the trainer that it describes, and the checkpoint to resume from.

    Raises:
        ValueError: for all that is refused.
    """
    written = read(arguments)
    os.environ.update(written.env)
    recipe = validate(written)
    logging.basicConfig(format="%(message)s")
    logger = logging.getLogger("fipo_trl")
    logger.setLevel(logging.INFO if recipe.training.process_index == 0 else logging.ERROR)
    if recipe.ignored:
        logger.info(
            f"trainer={recipe.run.trainer} does not read these settings of FIPO in {written.path}: "
            f"{', '.join(recipe.ignored)}."
        )
    for name, value in recipe.env.items():
        logger.info(f"{written.path} sets the environment variable {name}={value}.")
    from fipo_trl.recipe.build import build
    from fipo_trl.trainer.folder_lock import hold_output_dir
    from fipo_trl.trainer.resume import find_checkpoint

    training = recipe.training
    hold_output_dir(training)
    checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint, training.max_steps)
    return recipe, build(recipe, checkpoint), checkpoint


def leave_process_group(engine: Any = None):
    """End the processes' connection, when nothing refers to the trainer any more.

    The model that DDP wraps goes first. If it held the last reference to the process group, torch would wait for
    gloo's thread while it holds Python's lock, for which that thread may wait. Then a colocated vLLM `engine`, which
    shares the process group and takes it along; at the exit of the process it would look for it in vain.
    """
    gc.collect()
    if engine is not None:
        engine.llm_engine.engine_core.shutdown()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None):
    """Run one process of a training. Ends the process, with the exit status that [`train`] returns."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        show_help()
        return
    try:
        recipe, trainer, checkpoint = prepare(arguments)
    except (ValueError, OSError) as error:
        # Every process finds the same; the first one of a machine says it, and is the one that fails
        if not is_first_of_machine():
            sys.exit(0)
        print(f"error: {error}", file=sys.stderr)
        end(1)
    status = train(trainer, recipe, checkpoint)
    is_distributed = torch.distributed.is_initialized()
    colocated = trainer.use_vllm and trainer.vllm_generation.mode == "colocate"
    engine = trainer.vllm_generation.llm if colocated else None
    del trainer
    if is_distributed:
        leave_process_group(engine)
    end(status)


if __name__ == "__main__":
    main()
