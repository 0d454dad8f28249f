"""Reward functions by the names that a recipe gives them, and the columns that they read."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from trl import rewards as of_trl

from fipo_trl import rewards as of_fipo_trl
from fipo_trl.rewards.dapo import overlong_penalty


OVERLONG_PENALTIES = ("overlong_penalty", "get_soft_overlong_punishment")  # our name and TRL's of one reward


def load_rewards(
    names: Sequence[str] | None,
    max_completion_length: int,
    overlong_buffer: int | None = None,
    reward_model: str | None = None,
    folder: str | None = None,
    allow_unsandboxed: bool = False,
) -> list[Callable | str]:
    """The reward functions of a run, in order.

    Args:
        names: As [`load_reward`] takes them, or `overlong_penalty`.
        max_completion_length, overlong_buffer: Of [`fipo_trl.rewards.overlong_penalty`], in tokens. The buffer is a
            fifth of the length by default, as in DAPO (4,096 of 20,480).
        reward_model: Comes first, as TRL takes it.
        folder, allow_unsandboxed: Of [`load_reward`].

    Raises:
        ValueError: if one cannot be loaded, there is none, or `overlong_buffer` is for nothing.
    """
    names = names or []
    functions: list[Callable | str] = [reward_model] if reward_model else []
    for name in names:
        if name in OVERLONG_PENALTIES:
            buffer = max_completion_length // 5 if overlong_buffer is None else overlong_buffer
            functions.append(overlong_penalty(max_completion_length, buffer))
        else:
            functions.append(load_reward(name, folder=folder, allow_unsandboxed=allow_unsandboxed))
    if overlong_buffer is not None and not set(OVERLONG_PENALTIES) & set(names):
        raise ValueError("overlong_buffer does nothing without the reward overlong_penalty. Add it to reward_funcs.")
    if not functions:
        raise ValueError("reward_funcs is not set: name at least one reward function.")
    return functions


def load_reward(
    name: str, setting: str = "reward_funcs", folder: str | None = None, allow_unsandboxed: bool = False
) -> Callable:
    """The reward function of a name in `fipo_trl.rewards` or `trl.rewards`, or of an import path.

    Args:
        name: Of the function.
        setting: What error messages call the name.
        folder: Where modules are looked for after the working directory.
        allow_unsandboxed: Given to a function that [`runs_programs`].

    Raises:
        ValueError: if there is no such function.
    """
    try:
        if "." in name:
            function = find(name, folder)
        else:
            function = getattr(of_fipo_trl if name in of_fipo_trl.__all__ else of_trl, name)
        if not callable(function):
            raise AttributeError(f"it is a {type(function).__name__}, not a function")
        if allow_unsandboxed and runs_programs(function):
            return functools.partial(function, allow_unsandboxed=True)
        return function
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{setting}: cannot load '{name}' ({error}). Give a name in fipo_trl.rewards (dapo_reward, dapo_accuracy, "
            "overlong_penalty, reasoning_gym_reward, reasoning_gym_accuracy, code_reward, code_accuracy) or in "
            "trl.rewards (accuracy_reward, reasoning_accuracy_reward, think_format_reward), or an import path such as "
            "my_package.my_module.my_reward, looked for in the directory you start from, then in the recipe's folder."
        ) from error


def find(path: str, folder: str | None = None) -> Any:
    """What an import path such as `my_module.my_reward` names.

    Args:
        path: With at least one dot.
        folder: Where the module is looked for after the working directory.

    Raises:
        ImportError, AttributeError: if there is none.
    """
    module, _, attribute = path.rpartition(".")
    sys.path[:0] = [place for place in (os.getcwd(), folder) if place and place not in sys.path]
    return getattr(importlib.import_module(module), attribute)


def runs_programs(function: Callable | str) -> bool:
    """Whether a reward function runs programs of a model: it has the parameter `allow_unsandboxed`."""
    return is_function(function) and "allow_unsandboxed" in inspect.signature(function).parameters


def is_function(function: Callable | str) -> TypeGuard[Callable]:
    """Whether it is a function, or one with some of its arguments given; not a reward model."""
    return inspect.isroutine(function.func if isinstance(function, functools.partial) else function)


def columns_read_by(reward_funcs: Sequence[Callable | str]) -> list[str]:
    """Dataset columns without which a reward function would fail after the first generation."""
    from_trl = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
    return [
        parameter.name
        for function in reward_funcs
        if is_function(function)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in from_trl
    ]


def name_of(function: Callable | str) -> str:
    """What TRL calls a reward function in its metrics."""
    if isinstance(function, functools.partial):
        function = function.func
    return function.split("/")[-1] if isinstance(function, str) else function.__name__
