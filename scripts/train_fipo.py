"""Train a language model with FIPO, or with GRPO / DAPO on the same recipe as the control arm.

    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml
    accelerate launch scripts/train_fipo.py --config recipes/tiny/fipo.yaml --trainer grpo --output_dir outputs/dapo
    python scripts/train_fipo.py --config RECIPE.yaml --print_vllm_server_command   # for vllm_mode: server

Every field of `FIPOConfig`, of TRL's `ModelConfig` and of TRL's script arguments is a flag and a key of the YAML file;
flags win. An unknown one is an error. Ctrl-C (or a job scheduler's SIGTERM) saves a checkpoint and stops;
`--resume_from_checkpoint latest` goes on from it.
"""

import argparse
import difflib
import gc
import importlib
import inspect
import json
import logging
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import torch
import yaml
from transformers import AutoTokenizer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    rewards,
)
from trl.data_utils import is_conversational
from trl.scripts import vllm_serve
from trl.scripts.grpo import GRPOScriptArguments

from fipo_trl import DAPOTrainer, FIPOConfig, FIPOTrainer, reasoning_gym_rewards
from fipo_trl import rewards as dapo_rewards
from fipo_trl.data import from_dapo, is_dapo, load_problems, load_splits, no_longer_than
from fipo_trl.doctor import refuse_impossible
from fipo_trl.evaluation import score
from fipo_trl.evaluation_callback import EvaluationCallback, check_evaluation
from fipo_trl.monitoring import CollapseAlarm, latest_checkpoint
from fipo_trl.reasoning_gym_problems import is_task


# Exit status of a run that saved a checkpoint and stopped: by a signal, or by the collapse alarm
INTERRUPTED, COLLAPSED = 130, 3
OVERLONG_PENALTIES = ("overlong_penalty", "get_soft_overlong_punishment")  # our name and TRL's of one reward


@dataclass
class FIPOScriptArguments(GRPOScriptArguments):
    """TRL's arguments of its GRPO script, the choice of the trainer, and settings of DAPO's data and rewards."""

    trainer: Literal["fipo", "grpo"] = field(
        default="fipo",
        metadata={
            "help": "'fipo', or 'grpo': the loss of TRL's GRPOTrainer, and all else the same: the control arm (DAPO)."
        },
    )
    print_vllm_server_command: bool = field(
        default=False,
        metadata={"help": "Print how to start the vLLM server that a recipe with vllm_mode='server' needs, and stop."},
    )
    dataset_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of the task that dataset_name='reasoning_gym/<task>' names, as JSON: size, test_size, "
            "seed, and the task's own."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of more tokens are left out. For data in the schema of DAPO-Math-17k and for "
            "reasoning_gym/<task>."
        },
    )
    on_collapse: Literal["warn", "stop"] = field(
        default="warn",
        metadata={
            "help": "What to do when the run shows the signature of a collapse: 'warn' with the numbers, or also "
            "'stop'. Either saves a checkpoint."
        },
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Tokens before max_completion_length over which the reward 'overlong_penalty' falls from 0 to -1. "
            "Default: a fifth of it, as in DAPO."
        },
    )
    eval_problems: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problems to evaluate on before the first update, every eval_steps updates and after the last, "
            "beside TRL's own evaluation (eval_strategy): aime24, aime25, a folder, file or Hub id, "
            "reasoning_gym/<task> (with dataset_settings where it is dataset_name), or NAME=SOURCE."
        },
    )
    eval_samples: int = field(default=32, metadata={"help": "Samples per problem of eval_problems: n of avg@n."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Temperature of these samples."})
    eval_top_p: float = field(default=0.7, metadata={"help": "Top-p of these samples; the paper trains at 1.0."})
    eval_reward: str = field(
        default="dapo_accuracy",
        metadata={"help": "Reward function, named as in reward_funcs, that gives 1 where an answer is right, or 0."},
    )

    @property
    def task_settings(self) -> dict[str, dict]:
        """`dataset_settings` by the name of the task that they are for."""
        return {} if self.dataset_settings is None else {self.dataset_name: self.dataset_settings}


class Parser(TrlParser):
    """TRL's parser, which lets values of a YAML file through unread, with their types and choices checked."""

    def __init__(self):
        dataclasses = (FIPOScriptArguments, FIPOConfig, ModelConfig, DatasetMixtureConfig)
        super().__init__(
            dataclasses,
            description=__doc__,
            epilog="--config RECIPE.yaml reads any of these from a file.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `--max_step` must not pass for `--max_steps`
        )
        self.settings = {action.dest: action for action in self._actions if action.dest != "help"}
        self.types = {name: kind for cls in dataclasses for name, kind in get_type_hints(cls).items()}

    def error(self, message):  # argparse would print hundreds of lines of usage first
        raise ValueError(message)

    def check(self, name: str, value):
        """The value of a recipe's key, in the form in which argparse converts and checks it."""
        setting = self.settings[name]
        for kind, word in [(type(None), "null"), (dict, "a mapping")]:
            if isinstance(value, kind) and kind not in (get_origin(t) or t for t in get_args(self.types[name])):
                raise ValueError(f"'{name}' cannot be {word}.")
        takes_list = setting.nargs in ("+", "*")
        if isinstance(value, list) and not takes_list:
            raise ValueError(f"'{name}' takes one value, got the list {value}.")
        values = value if isinstance(value, list) else [value]
        if setting.choices and not set(values) <= set(setting.choices):
            raise ValueError(f"'{name}' must be one of {', '.join(map(str, setting.choices))}, got {value}.")
        if takes_list and value is not None:
            return values
        return str(value) if isinstance(value, (bool, int, float)) else value  # argparse converts strings


def parse(arguments: list[str] | None = None) -> tuple:
    """Parse the command line and the YAML file that it names.

    Returns:
        (script arguments, FIPOConfig, ModelConfig, DatasetMixtureConfig).

    Raises:
        ValueError: for a key or flag that nothing reads, with the nearest one that exists; for a key given twice; for
            a value of the wrong type; and for every setting that `FIPOConfig` refuses.
    """
    parser = Parser()
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_parser.error = parser.error
    options, flags = config_parser.parse_known_args(arguments)
    given = {flag.split("=", 1)[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    spelled = {option.lstrip("-").replace("-", "_") for action in parser._actions for option in action.option_strings}
    refuse_unknown(given, spelled, "argument")

    recipe = {} if options.config is None else read_recipe(options.config, parser)
    same = {"steps_per_generation", "generation_batch_size"}  # two ways to say one thing: only one may be set
    if same & given:
        recipe = {name: value for name, value in recipe.items() if name not in same}
    parser.set_defaults_with_config(**recipe)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"a setting has a value that it cannot take: {error}") from error
    if rest:
        raise ValueError(f"'{rest[0]}' is not understood. Flags start with two dashes; a recipe follows --config.")
    lora = sorted(name for name in recipe.keys() | given if name.startswith("lora_"))
    if lora and not parsed[2].use_peft:
        raise ValueError(f"'{lora[0]}' does nothing without use_peft: true. Set that, or remove it.")
    of_problems = {"eval_samples", "eval_temperature", "eval_top_p", "eval_reward"} & (recipe.keys() | given)
    if of_problems and not parsed[0].eval_problems:
        raise ValueError(f"'{min(of_problems)}' does nothing without eval_problems. Set that, or remove it.")
    if parsed[0].dataset_settings is not None:
        if not is_task(parsed[0].dataset_name or ""):
            raise ValueError(
                f"'dataset_settings' does nothing with dataset_name={parsed[0].dataset_name}. It is for "
                "reasoning_gym/<task>: remove it."
            )
        parsed[0].dataset_settings = as_mapping(parsed[0].dataset_settings)
    if parsed[0].eval_problems:
        check_evaluation(parsed[1].eval_steps, *sampling_of(parsed[0]))
    return tuple(parsed)


def as_mapping(settings: dict | str, setting: str = "dataset_settings") -> dict:
    """A mapping, or its JSON as the command line gives it.

    Raises:
        ValueError: if it is not one.
    """
    try:
        mapping = json.loads(settings) if isinstance(settings, str) else settings
    except ValueError as error:
        raise ValueError(f"{setting}={settings} is not valid JSON: {error}.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f'{setting}={settings} must be a mapping, such as {{"size": 2000}}.')
    return mapping


def read_recipe(path: str, parser: Parser) -> dict:
    """The settings in a YAML file, ready for argparse. Sets the environment variables under its key `env`."""
    if not os.path.isfile(path):
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        with open(path) as file:
            document = yaml.compose(file, Loader=yaml.SafeLoader)
        with open(path) as file:
            recipe = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold 'key: value' lines.")
    keys = [key.value for key, _ in document.value]
    for key in keys:
        if keys.count(key) > 1:  # YAML would let the last one win
            raise ValueError(f"{path}: '{key}' is given {keys.count(key)} times. Keep one.")
    os.environ.update({name: str(value) for name, value in (recipe.pop("env", None) or {}).items()})
    refuse_unknown(recipe, parser.settings, path)
    try:
        return {name: parser.check(name, value) for name, value in recipe.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_unknown(names, known, where: str):
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(f"{where}: nothing reads '{name}'.{hint}")


def load_rewards(script_args: FIPOScriptArguments, training_args: FIPOConfig) -> list:
    """The reward functions named in the recipe: names in `fipo_trl.rewards` or `trl.rewards`, paths, or a model."""
    functions = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in script_args.reward_funcs or []:
        if name in OVERLONG_PENALTIES:
            length, buffer = training_args.max_completion_length, script_args.overlong_buffer
            # By default the last fifth is penalised, as in DAPO (4,096 of 20,480 tokens)
            functions.append(dapo_rewards.overlong_penalty(length, length // 5 if buffer is None else buffer))
            continue
        functions.append(load_reward(name))
    if script_args.overlong_buffer is not None and not set(OVERLONG_PENALTIES) & set(script_args.reward_funcs or []):
        raise ValueError("overlong_buffer does nothing without the reward overlong_penalty. Add it to reward_funcs.")
    if not functions:
        raise ValueError("reward_funcs is not set: name at least one reward function.")
    return functions


def load_reward(name: str, setting: str = "reward_funcs"):
    """The reward function of a name in `fipo_trl.rewards` or `trl.rewards`, or of an import path."""
    module_path, _, attribute = name.rpartition(".")
    if module_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if module_path:
            module = importlib.import_module(module_path)
        else:
            ours = [module for module in (dapo_rewards, reasoning_gym_rewards) if hasattr(module, name)]
            module = ours[0] if ours else rewards
        function = getattr(module, attribute)
        if not callable(function):
            raise AttributeError(f"it is a {type(function).__name__}, not a function")
        return function
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{setting}: cannot load '{name}' ({error}). Give a name in fipo_trl.rewards (dapo_reward, "
            "dapo_accuracy, overlong_penalty), fipo_trl.reasoning_gym_rewards (reasoning_gym_reward, "
            "reasoning_gym_accuracy) or trl.rewards (accuracy_reward, reasoning_accuracy_reward, "
            "think_format_reward), or an import path such as my_package.my_module.my_reward."
        ) from error


def sampling_of(script_args: FIPOScriptArguments) -> tuple[int, float, float]:
    """How the problems of `eval_problems` are sampled: n, temperature and top-p."""
    return script_args.eval_samples, script_args.eval_temperature, script_args.eval_top_p


def load_evaluation(
    sources: list[str],
    reward: str,
    settings=("eval_problems", "eval_reward"),
    task_settings: dict[str, dict] | None = None,
) -> tuple:
    """What to evaluate on and by.

    Args:
        sources: Of problems, as `fipo_trl.data.load_problems` reads them.
        reward: Of `load_reward`.
        settings: What error messages call the two.
        task_settings: Of `load_problems`.

    Returns:
        `{name: dataset}` and the reward function.

    Raises:
        ValueError: if one cannot be loaded, or they do not fit each other.
    """
    accuracy = load_reward(reward, settings[1])
    problems = {}
    for source in sources:
        name, dataset = load_problems(source, settings[0], task_settings)
        if name in problems:
            raise ValueError(f"{settings[0]}: two sources are called '{name}'. Rename one with NAME=SOURCE.")
        for column in columns_read_by([accuracy]):
            if column not in dataset.column_names:
                raise ValueError(
                    f"{settings[0]}: '{source}' has no column '{column}', which {reward} reads, only "
                    f"{', '.join(dataset.column_names)}."
                )
        row = {column: [value] for column, value in dataset[0].items()}
        nothing = [{"role": "assistant", "content": ""}] if is_conversational(dataset[0]) else ""
        score(accuracy, row.pop("prompt"), [nothing], completion_ids=[[]], **row)  # refuses other values than 0 and 1
        problems[name] = dataset
    return problems, accuracy


def load_data(
    script_args: FIPOScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool, reward_funcs: list, tokenizer=None
):
    """The train split and, if it is used, the test split, checked for the columns that training will read.

    Data in the schema of DAPO-Math-17k are known by their columns, and converted.
    """
    if mixture.datasets and script_args.dataset_name:
        raise ValueError("Both 'datasets' and 'dataset_name' are set. Keep one.")
    if mixture.datasets:
        splits = get_dataset(mixture)
    elif script_args.dataset_name:
        splits = load_splits(
            script_args.dataset_name,
            script_args.dataset_config,
            script_args.dataset_streaming,
            task_settings=script_args.dataset_settings,
        )
    else:
        raise ValueError("dataset_name is not set: give a local folder or file, or the id of a dataset on the Hub.")

    names = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for name in names:
        if name not in splits:
            raise ValueError(f"The dataset has no split '{name}', only {', '.join(splits)}.")
        longest = script_args.max_prompt_length
        try:
            if is_dapo(splits[name].column_names):
                splits[name] = from_dapo(splits[name], tokenizer, longest)
            elif longest is not None and is_task(script_args.dataset_name or ""):
                splits[name] = no_longer_than(longest, splits[name], tokenizer)
            elif longest is not None:
                raise ValueError(
                    "max_prompt_length is for data in the schema of DAPO-Math-17k and for reasoning_gym/<task>. "
                    "Remove it."
                )
        except ValueError as error:
            raise ValueError(f"Split '{name}' of the dataset: {error}") from error
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
    latest = latest_checkpoint(training_args.output_dir)
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
        wanted = str(latest)
    if not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint={wanted}: there is no such folder.")
    done = TrainerState.load_from_json(os.path.join(wanted, TRAINER_STATE_NAME)).global_step
    if 0 < training_args.max_steps <= done:  # transformers would make one more update
        raise ValueError(f"{wanted} has made {done} of max_steps={training_args.max_steps} updates. Raise max_steps.")
    return wanted


class StopOnSignal(TrainerCallback):
    """Turns SIGINT (Ctrl-C) and SIGTERM (a job scheduler) into: finish this update, save a checkpoint, stop.

    The signal must reach the training processes. torchrun kills them 30 s after it got one itself. A second Ctrl-C
    ends a single process at once; several it does not, because launchers pass on what the terminal has already sent.
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
    decides = training_args.dynamic_sampling_reward
    names = [getattr(function, "__name__", str(function).split("/")[-1]) for function in reward_funcs]
    if decides is not None and decides not in names:
        raise ValueError(
            f"dynamic_sampling_reward='{decides}' is not one of the reward functions, {', '.join(names)}."
        )
    evaluate = training_args.eval_strategy != "no"
    tokenizer = None
    if script_args.max_prompt_length is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    train_dataset, eval_dataset = load_data(script_args, mixture, evaluate, reward_funcs, tokenizer)
    refuse_impossible(script_args, training_args, model_args)
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


def build_trainer(script_args, training_args, model_args, mixture) -> tuple[DAPOTrainer, str | None]:
    """The trainer that the arguments describe, and the checkpoint to resume from.

    Raises:
        SystemExit: with a message, for what `find_checkpoint` and `prepare` refuse.
    """
    try:
        checkpoint = find_checkpoint(training_args)
        trainer_arguments = prepare(script_args, training_args, model_args, mixture)
        evaluation = load_evaluation(
            script_args.eval_problems or [], script_args.eval_reward, task_settings=script_args.task_settings
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    trainer_class = {"fipo": FIPOTrainer, "grpo": DAPOTrainer}[script_args.trainer]
    trainer = trainer_class(**trainer_arguments)
    if script_args.eval_problems:
        try:
            trainer.add_callback(EvaluationCallback(trainer, *evaluation, *sampling_of(script_args)))
        except ValueError as error:
            sys.exit(f"error: {error}")
    return trainer, checkpoint


def train(
    trainer: DAPOTrainer, checkpoint: str | None, dataset_name: str | None = None, on_collapse: str = "warn"
) -> int:
    """Train, and save the model with its card and `trainer_state.json`, from which scripts/report.py draws.

    Returns:
        The exit status: 0 if training ran to its end, else `INTERRUPTED` or `COLLAPSED`. Then the checkpoint is its
        last word.
    """
    output_dir = trainer.args.output_dir
    stop_on_signal, alarm = StopOnSignal(), CollapseAlarm(on_collapse)
    trainer.add_callback(stop_on_signal)
    trainer.add_callback(alarm)
    trainer.train(resume_from_checkpoint=checkpoint)
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
    trainer.save_model(output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Trained for {trainer.state.global_step} updates. The model is in {output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    return 0


def main():
    try:
        arguments = parse()
        script_args, training_args, model_args, _ = arguments
        if script_args.print_vllm_server_command:
            print(vllm_server_command(training_args, model_args))
            return
    except ValueError as error:
        sys.exit(f"error: {error}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fipo_trl").setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    trainer, checkpoint = build_trainer(*arguments)
    status = train(trainer, checkpoint, script_args.dataset_name, script_args.on_collapse)
    if torch.distributed.is_initialized():
        # The model that DDP wraps goes first. If it held the last reference to the process group, torch would wait for
        # gloo's thread while it holds Python's lock, for which that thread may wait
        del trainer
        gc.collect()
        torch.distributed.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
