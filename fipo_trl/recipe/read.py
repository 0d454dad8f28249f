"""The first step: a command line and the YAML file that it names -> what was written, with every name known.

The second step, `validate`, makes settings of it. Neither imports a trainer or vLLM: a mistake is told at once.
"""

import argparse
import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from fipo_trl.recipe.arguments import RunArguments
from fipo_trl.recipe.trainers import config_class_of
from fipo_trl.trainer.dapo_config import DAPOConfig
from fipo_trl.trainer.fipo_config import FIPOConfig


# Settings that name a file or a folder, which may lie beside the recipe
PATHS = ("model_name_or_path", "dataset_name", "eval_problems")
# Variables by which a recipe would change what program runs, before anyone sees it
REFUSED_ENV = ("LD_", "DYLD_", "PYTHON")
OF_FIPO = {f.name for f in fields(FIPOConfig)} - {f.name for f in fields(DAPOConfig)}  # what DAPO does not read


@dataclass(frozen=True)
class Written:
    """What a user wrote.

    Attributes:
        path: The recipe's file, if there is one.
        recipe: Its settings, without `env`, in the form in which argparse converts them.
        env: The environment variables under its key `env`.
        flags: The rest of the command line, which wins over the recipe.
        config_class: What the trainer reads.
        ignored: Settings of FIPO in the recipe, where a flag chose a trainer that does not read them.
    """

    path: str | None
    recipe: dict[str, Any]
    env: dict[str, str]
    flags: tuple[str, ...]
    config_class: type[DAPOConfig]
    ignored: tuple[str, ...]

    @property
    def folder(self) -> str | None:
        """Of the recipe's file."""
        return folder_of(self.path)

    @property
    def given(self) -> set[str]:
        """The names of the flags."""
        return names_of(self.flags)

    @property
    def names(self) -> set[str]:
        """The names of all settings that were written, in the recipe or as flags."""
        return self.recipe.keys() | self.given


class Parser(TrlParser):
    """TRL's parser, which lets values of a YAML file through unread, with their types and choices checked."""

    def __init__(self, config_class: type[DAPOConfig] = FIPOConfig, **kwargs):
        dataclasses = (RunArguments, config_class, ModelConfig, DatasetMixtureConfig)
        # Without abbreviations: `--max_step` must not pass for `--max_steps`
        super().__init__(
            dataclasses, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )
        self.settings = {action.dest: action for action in self._actions if action.dest != "help"}
        self.types = {name: kind for cls in dataclasses for name, kind in get_type_hints(cls).items()}

    def error(self, message):  # argparse would print hundreds of lines of usage first
        raise ValueError(message)

    def check(self, name: str, value):
        """The value of a recipe's key, in the form in which argparse converts and checks it."""
        setting = self.settings[name]
        refused: list[tuple[type, str]] = [(type(None), "null"), (dict, "a mapping")]
        for kind, word in refused:
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


class OneFlag(argparse.ArgumentParser):
    """Finds one flag among others."""

    def error(self, message) -> NoReturn:
        raise ValueError(message)


def read(arguments: Iterable[str]) -> Written:
    """Read the command line and the YAML file that follows `--config`, and refuse every name that nothing reads.

    Raises:
        ValueError: for a key or flag that nothing reads, with the nearest one that exists; for a key given twice; for
            a value of the wrong type in the recipe; for a trainer that cannot be loaded; for a setting of FIPO where
            the trainer does not read it.
    """
    first = OneFlag(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    options, flags = first.parse_known_args(list(arguments))
    trainer = OneFlag(add_help=False, allow_abbrev=False)
    trainer.add_argument("--trainer")
    by_flag = trainer.parse_known_args(flags)[0].trainer

    settings, env = ({}, {}) if options.config is None else read_file(options.config)
    wanted = str(by_flag or settings.get("trainer", "fipo"))
    config_class = config_class_of(wanted, folder_of(options.config))
    parser = Parser(config_class)
    not_read = OF_FIPO - parser.settings.keys()
    ignored = sorted(settings.keys() & not_read)
    of_flags = names_of(flags) & not_read
    if of_flags or (ignored and by_flag is None):
        where, name = ("argument", min(of_flags)) if of_flags else (options.config, ignored[0])
        raise ValueError(f"{where}: '{name}' is a setting of FIPO, and trainer={wanted} does not read it. Remove it.")
    spelled = {option.lstrip("-").replace("-", "_") for action in parser._actions for option in action.option_strings}
    refuse_unknown(names_of(flags), spelled, "argument")
    path = options.config or ""
    recipe = checked(path, {name: value for name, value in settings.items() if name not in ignored}, parser)
    if ignored:  # a slip in what this trainer does not read is told all the same
        of_fipo = Parser(FIPOConfig)
        values = checked(path, {name: settings[name] for name in ignored}, of_fipo)
        of_fipo.parse_known_args([f"--{name}={value}" for name, value in values.items()])
    return Written(
        path=options.config,
        recipe=recipe,
        env=env,
        flags=tuple(flags),
        config_class=config_class,
        ignored=tuple(ignored),
    )


def folder_of(path: str | None) -> str | None:
    """The folder of a recipe's file, if there is one."""
    return None if path is None else os.path.dirname(os.path.abspath(path))


def names_of(flags: Iterable[str]) -> set[str]:
    """The names of the settings among the words of a command line."""
    return {flag.split("=", 1)[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}


def read_file(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings in a YAML file as they are written, and the environment variables under its key `env`."""
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
    env = {name: str(value) for name, value in (recipe.pop("env", None) or {}).items()}
    for name in env:
        if name.startswith(REFUSED_ENV):
            raise ValueError(f"{path}: env sets {name}, which changes what program runs. Set it yourself, outside.")
    return recipe, env


def checked(path: str, recipe: dict[str, Any], parser: Parser) -> dict[str, Any]:
    """The settings of a file, in the form in which argparse converts them."""
    refuse_unknown(recipe, parser.settings, path)
    try:
        recipe = {name: parser.check(name, value) for name, value in recipe.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    folder = os.path.dirname(path)
    return {name: beside(folder, value) if name in PATHS else value for name, value in recipe.items()}


def beside(folder: str, value):
    """The path of what lies in the recipe's folder and not in the working directory; else the value as it is."""
    if isinstance(value, list):
        return [beside(folder, each) for each in value]
    name, equals, path = value.partition("=") if isinstance(value, str) and "=" in value else ("", "", value)
    if isinstance(path, str) and folder and not os.path.exists(path) and os.path.exists(os.path.join(folder, path)):
        path = os.path.join(folder, path)
    return f"{name}{equals}{path}" if equals else path


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str):
    """Raise a `ValueError` for a name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(f"{where}: nothing reads '{name}'.{hint}")
