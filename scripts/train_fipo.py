"""Train a language model with FIPO, or with GRPO / DAPO on the same recipe as the control arm.

    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml
    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml --trainer grpo --output_dir outputs/dapo
    python scripts/train_fipo.py --config RECIPE.yaml --print_vllm_server_command   # for vllm_mode: server

Every field of `FIPOConfig`, of TRL's `ModelConfig` and of TRL's script arguments is a flag and a key of the YAML file;
flags win. An unknown one is an error. Ctrl-C (or a job scheduler's SIGTERM) saves a checkpoint and stops;
`--resume_from_checkpoint latest` goes on from it.
"""

import difflib
import importlib
import inspect
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import torch
import yaml
from datasets import load_dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    DatasetMixtureConfig,
    GRPOTrainer,
    ModelConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    rewards,
)
from trl.scripts import vllm_serve
from trl.scripts.grpo import GRPOScriptArguments

from fipo_trl import FIPOConfig, FIPOTrainer


INTERRUPTED = 130  # exit status of a run that was stopped by a signal, after it saved a checkpoint


@dataclass
class FIPOScriptArguments(GRPOScriptArguments):
    """TRL's arguments of its GRPO script, and the choice of the trainer."""

    trainer: Literal["fipo", "grpo"] = field(
        default="fipo",
        metadata={"help": "'fipo', or 'grpo': TRL's GRPOTrainer with the same settings, as the control arm (DAPO)."},
    )
    print_vllm_server_command: bool = field(
        default=False,
        metadata={"help": "Print how to start the vLLM server that a recipe with vllm_mode='server' needs, and stop."},
    )


def make_parser() -> TrlParser:
    return TrlParser(
        (FIPOScriptArguments, FIPOConfig, ModelConfig, DatasetMixtureConfig),
        description=__doc__,
        epilog="--config RECIPE.yaml reads any of these from a file.",
        allow_abbrev=False,  # `--max_step` must not pass for `--max_steps`
    )


def parse(arguments: list[str] | None = None) -> tuple:
    """Parse the command line and the YAML file that it names.

    Returns:
        (script arguments, FIPOConfig, ModelConfig, DatasetMixtureConfig).

    Raises:
        ValueError: for a key or flag that nothing reads, with the nearest one that exists; for a key given twice; and
            for every setting that `FIPOConfig` refuses.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # argparse takes `--config=recipe.yaml` too; TRL's parser wants two words
    arguments = [word for a in arguments for word in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser = make_parser()
    known = {action.dest for action in parser._actions} | {"config", "env"}
    if "--config" in arguments[:-1]:
        path = arguments[arguments.index("--config") + 1]
        if not os.path.isfile(path):
            raise ValueError(f"--config {path}: there is no such file.")
        refuse_unknown(yaml_keys(path), known, where=path)
    flags = [a.split("=", 1)[0].removeprefix("--") for a in arguments if a.startswith("--")]
    refuse_unknown(flags, known | {flag.lstrip("-") for a in parser._actions for flag in a.option_strings}, "argument")
    return parser.parse_args_and_config(arguments)


def yaml_keys(path: str) -> list[str]:
    """The top-level keys of a YAML mapping. YAML lets a key stand twice and the last win: here, that is an error."""
    with open(path) as file:
        document = yaml.compose(file, Loader=yaml.SafeLoader)
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"{path} must hold 'key: value' lines.")
    keys = [key.value for key, _ in document.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{path}: '{key}' is given {keys.count(key)} times. Keep one.")
    return keys


def refuse_unknown(names: list[str], known: set[str], where: str):
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            raise ValueError(
                f"{where}: nothing reads '{name}'." + (f" Did you mean '{nearest[0]}'?" if nearest else "")
            )


def load_rewards(script_args: FIPOScriptArguments, training_args: FIPOConfig) -> list:
    """The reward functions named in the recipe: names from `trl.rewards`, dotted paths, or a reward model."""
    functions = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in script_args.reward_funcs or []:
        module_path, _, attribute = name.rpartition(".")
        if not module_path and name == "get_soft_overlong_punishment":
            length = training_args.max_completion_length
            # The last fifth is penalised, as in DAPO (4,096 of 20,480 tokens)
            functions.append(rewards.get_soft_overlong_punishment(length, length // 5))
            continue
        if module_path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_path) if module_path else rewards
            functions.append(getattr(module, attribute))
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"reward_funcs: cannot load '{name}' ({error}). Give a name in trl.rewards (accuracy_reward, "
                "reasoning_accuracy_reward, think_format_reward, get_soft_overlong_punishment) or an import path such "
                "as my_package.my_module.my_reward."
            ) from error
    if not functions:
        raise ValueError("reward_funcs is not set: name at least one reward function.")
    return functions


def load_data(script_args: FIPOScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool, reward_funcs: list):
    """The train split and, if it is used, the test split, checked for the columns that training will read."""
    if mixture.datasets and script_args.dataset_name:
        raise ValueError("Both 'datasets' and 'dataset_name' are set. Keep one.")
    if mixture.datasets:
        splits = get_dataset(mixture)
    elif script_args.dataset_name:
        try:
            splits = load_dataset(
                script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming
            )
        except Exception as error:
            raise ValueError(
                f"dataset_name: cannot load '{script_args.dataset_name}' ({error}). Give a local folder (relative to "
                "the directory you start from) or the id of a dataset on the Hugging Face Hub."
            ) from error
    else:
        raise ValueError("dataset_name is not set: give a local folder or the id of a dataset on the Hub.")

    names = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for name in names:
        if name not in splits:
            raise ValueError(f"The dataset has no split '{name}', only {', '.join(splits)}.")
        columns = splits[name].column_names
        for column in ["prompt", *columns_read_by(reward_funcs)]:
            if columns is not None and column not in columns:
                raise ValueError(
                    f"Split '{name}' of the dataset has no column '{column}', only {', '.join(columns)}. TRL reads "
                    "'prompt', and the reward functions read the columns that they name as parameters."
                )
    return splits[names[0]], splits[names[1]] if evaluate else None


def columns_read_by(reward_funcs: list) -> list[str]:
    """Dataset columns without which a reward function would fail after the first generation."""
    from_trl = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
    return [
        parameter.name
        for function in reward_funcs
        if inspect.isroutine(function)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in from_trl
    ]


def vllm_server_command(training_args: FIPOConfig, model_args: ModelConfig) -> str:
    """The `vllm serve` line with which this TRL can sample and synchronize weights: TRL's own, for this recipe.

    Raises:
        ValueError: if the recipe uses no server.
    """
    if not training_args.use_vllm or training_args.vllm_mode != "server":
        raise ValueError(
            f"use_vllm={training_args.use_vllm}, vllm_mode='{training_args.vllm_mode}' needs no vLLM server. Set "
            "use_vllm: true and vllm_mode: server."
        )
    url = urlsplit(training_args.vllm_server_base_url or f"http://:{training_args.vllm_server_port}")
    command = vllm_serve.build_command(
        vllm_serve.ScriptArguments(
            model=model_args.model_name_or_path,
            revision=model_args.model_revision,
            tensor_parallel_size=training_args.vllm_tensor_parallel_size,
            port=url.port or 8000,
            max_model_len=training_args.vllm_max_model_length,
            vllm_model_impl=training_args.vllm_model_impl,
            trust_remote_code=training_args.trust_remote_code,
        )
    )
    # Dev mode has the endpoints through which TRL synchronizes weights
    return "VLLM_SERVER_DEV_MODE=1 " + shlex.join(["vllm", *command[command.index("serve") :]])


def find_checkpoint(training_args: FIPOConfig) -> str | None:
    """The checkpoint to resume from. An output folder with the checkpoints of another run is not overwritten."""
    latest = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if latest:
            raise ValueError(
                f"output_dir={training_args.output_dir} holds {os.path.basename(latest)} of an earlier run. Pass "
                "--resume_from_checkpoint latest to go on with it, or another --output_dir."
            )
        return None
    if str(wanted).lower() in ("latest", "true"):
        if latest is None:
            raise ValueError(
                f"resume_from_checkpoint={wanted}, but output_dir={training_args.output_dir} holds no checkpoint."
            )
        return latest
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint={wanted}: there is no such folder.")
    return wanted


class StopOnSignal(TrainerCallback):
    """Turns SIGINT (Ctrl-C) and SIGTERM (a job scheduler) into: finish this update, save a checkpoint, stop.

    A second Ctrl-C ends a single process at once. With several processes it does not, because launchers pass on the
    signal that the terminal has already sent.
    """

    def __init__(self):
        self.requested = False  # on this process
        self.stopped = False  # agreed by all processes

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def on_train_end(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _request(self, number, frame):
        if self.requested and not torch.distributed.is_initialized():
            raise KeyboardInterrupt
        if not self.requested:
            print("\nStopping after this update, and saving a checkpoint ...", file=sys.stderr, flush=True)
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor(float(self.requested), device=args.device)
        if torch.distributed.is_initialized():  # all processes must stop at the same update
            torch.distributed.all_reduce(requested)
        if requested.item():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


def prepare(script_args, training_args, model_args, mixture) -> dict:
    """All that can be checked before a model is loaded.

    Returns:
        Keyword arguments of the trainer.

    Raises:
        ValueError: if the model is not named, a reward function or the data cannot be loaded or do not fit each other.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: give a local folder or the id of a model on the Hub.")
    reward_funcs = load_rewards(script_args, training_args)
    evaluate = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, mixture, evaluate, reward_funcs)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return {
        "model": model_args.model_name_or_path,
        "reward_funcs": reward_funcs,
        "args": training_args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def build_trainer(script_args, training_args, model_args, mixture) -> tuple[GRPOTrainer, str | None]:
    """The trainer that the arguments describe, and the checkpoint to resume from.

    Raises:
        SystemExit: with a message, for what `find_checkpoint` and `prepare` refuse.
    """
    try:
        checkpoint = find_checkpoint(training_args)
        trainer_arguments = prepare(script_args, training_args, model_args, mixture)
    except ValueError as error:
        sys.exit(f"error: {error}")
    trainer_class = {"fipo": FIPOTrainer, "grpo": GRPOTrainer}[script_args.trainer]
    return trainer_class(**trainer_arguments), checkpoint


def train(trainer: GRPOTrainer, checkpoint: str | None, dataset_name: str | None = None) -> bool:
    """Train, and save the model with its card.

    Returns:
        Whether training ran to its end. If a signal stopped it, the checkpoint is its last word.
    """
    output_dir = trainer.args.output_dir
    stop_on_signal = StopOnSignal()
    trainer.add_callback(stop_on_signal)
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop_on_signal.stopped:
        trainer.accelerator.print(
            f"Stopped at update {trainer.state.global_step}, with a checkpoint in {output_dir}. The same command with "
            "--resume_from_checkpoint latest goes on from there."
        )
        return False
    trainer.save_model(output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Trained for {trainer.state.global_step} updates. The model is in {output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    return True


def main():
    try:
        arguments = parse()
        script_args, training_args, model_args, _ = arguments
        if script_args.print_vllm_server_command:
            print(vllm_server_command(training_args, model_args))
            return
    except ValueError as error:
        sys.exit(f"error: {error}")
    trainer, checkpoint = build_trainer(*arguments)
    finished = train(trainer, checkpoint, script_args.dataset_name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not finished:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
