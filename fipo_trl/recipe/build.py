"""The third step: settings -> a trainer with its data and rewards.

What can be checked is checked before a model is loaded.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from trl import get_dataset, get_peft_config, get_quantization_config

from fipo_trl.data.code_problems import from_code, is_code
from fipo_trl.data.dapo_math import from_dapo, is_dapo, no_longer_than
from fipo_trl.data.reasoning_gym import is_task
from fipo_trl.data.sources import load_splits
from fipo_trl.evaluation.problems import load_evaluation
from fipo_trl.recipe.model_limits import find_config, impossible, name_of_model
from fipo_trl.recipe.trainers import find_trainer
from fipo_trl.recipe.validate import Recipe
from fipo_trl.rewards.names import columns_read_by, load_reward, load_rewards, name_of, runs_programs


if TYPE_CHECKING:  # imported when all else is known to be right: it takes seconds
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer


def build(recipe: Recipe, checkpoint: str | None = None) -> "DAPOTrainer":
    """The trainer that a recipe describes, with its evaluation callback.

    Args:
        recipe: What is to be trained.
        checkpoint: Folder from which it is to go on.

    Raises:
        ValueError: if the model is not named, a reward function, the data or the problems to evaluate on cannot be
            loaded or do not fit each other, the model cannot do what is asked of it, or another run saved the
            checkpoint.
    """
    arguments = trainer_arguments(recipe)
    problems, accuracy = load_evaluation(
        recipe.run.eval_problems or [],
        recipe.run.eval_reward,
        task_settings=recipe.run.task_settings,
        folder=recipe.folder,
        allow_unsandboxed=recipe.run.allow_unsandboxed,
    )
    from fipo_trl.evaluation.callback import EvaluationCallback
    from fipo_trl.trainer.manifest import fingerprint, refuse_changes, run_of

    trainer_class = find_trainer(recipe.run.trainer, recipe.folder)
    if checkpoint is not None:
        rewards = [name_of(function) for function in arguments["reward_funcs"]]
        data = fingerprint(arguments["train_dataset"])
        refuse_changes(run_of(trainer_class.__name__, arguments["args"], rewards, data), checkpoint)
    trainer = trainer_class(**arguments)
    if recipe.run.eval_problems:
        trainer.add_callback(EvaluationCallback(trainer, problems, accuracy, *recipe.eval_sampling))
    return trainer


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of the trainer. Errors are those of [`build`]."""
    training, model = recipe.training, recipe.model
    name = name_of_model(model)
    reward_funcs = rewards_of(recipe)
    decides, names = training.dynamic_sampling_reward, [name_of(function) for function in reward_funcs]
    if decides is not None and decides not in names:
        raise ValueError(
            f"dynamic_sampling_reward='{decides}' is not one of the reward functions, {', '.join(names)}."
        )
    train_dataset, eval_dataset = load_data(recipe, reward_funcs)
    find_sandbox(reward_funcs, train_dataset)
    if reasons := impossible(recipe, find_config(model, training.trust_remote_code), training.world_size):
        raise ValueError("\n".join(reasons))
    args = copy.copy(training)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return {
        "model": name,
        "reward_funcs": reward_funcs,
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def rewards_of(recipe: Recipe) -> list[Callable | str]:
    """The reward functions of a recipe. Errors are those of [`load_rewards`]."""
    run = recipe.run
    functions = load_rewards(
        run.reward_funcs,
        recipe.training.max_completion_length,
        run.overlong_buffer,
        run.reward_model_name_or_path,
        recipe.folder,
        run.allow_unsandboxed,
    )
    if run.allow_unsandboxed:
        of_evaluation = [load_reward(run.eval_reward, "eval_reward", recipe.folder)] if run.eval_problems else []
        if not any(map(runs_programs, [*functions, *of_evaluation])):
            raise ValueError("'allow_unsandboxed' does nothing: no reward runs programs of the model. Remove it.")
    return functions


def find_sandbox(reward_funcs: Sequence[Callable | str], dataset: Dataset | IterableDataset):
    """Ask rewards that run programs for that of an empty answer: they raise a `ValueError` where no sandbox is."""
    for function in reward_funcs:
        if runs_programs(function):
            row = next(iter(dataset))
            nothing = [{"role": "assistant", "content": ""}] if isinstance(row["prompt"], list) else ""
            function(completions=[nothing], **{column: [value] for column, value in row.items()})  # type: ignore


def load_data(recipe: Recipe, reward_funcs: Sequence[Callable | str]) -> tuple[Dataset, Dataset | None]:
    """The train split and, if it is used, the test split, checked for the columns that training will read.

    Data in the schema of DAPO-Math-17k, and of public datasets of programming problems, are known by their columns,
    and converted.
    """
    run, longest = recipe.run, recipe.run.max_prompt_length
    if recipe.mixture.datasets and run.dataset_name:
        raise ValueError("Both 'datasets' and 'dataset_name' are set. Keep one.")
    if recipe.mixture.datasets:
        splits = get_dataset(recipe.mixture)
    elif run.dataset_name:
        of_task = run.task_settings.get(run.dataset_name)
        splits = load_splits(run.dataset_name, run.dataset_config, run.dataset_streaming, task_settings=of_task)
    else:
        raise ValueError("dataset_name is not set: give a local folder or file, or the id of a dataset on the Hub.")

    tokenizer = None
    if longest is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.model.model_name_or_path,
            revision=recipe.model.model_revision,
            trust_remote_code=recipe.training.trust_remote_code,
        )
    evaluate = recipe.training.eval_strategy != "no"
    names = [run.dataset_train_split] + ([run.dataset_test_split] if evaluate else [])
    for name in names:
        if name not in splits:
            raise ValueError(f"The dataset has no split '{name}', only {', '.join(splits)}.")
        try:
            if of_dapo := is_dapo(splits[name].column_names):
                splits[name] = from_dapo(splits[name], tokenizer, longest)
            elif is_code(splits[name].column_names):
                splits[name] = from_code(splits[name])
            elif longest is not None and not is_task(run.dataset_name or ""):
                raise ValueError(
                    "max_prompt_length is for data in the schema of DAPO-Math-17k or of a public dataset of "
                    "programming problems, and for reasoning_gym/<task>. Remove it."
                )
            if longest is not None and not of_dapo:
                splits[name] = no_longer_than(longest, splits[name], tokenizer)
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
