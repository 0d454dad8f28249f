"""Problems of reasoning-gym: its procedural tasks in logic, games, code, algorithms, ... as rows to train on.

A row names its problem by task, settings and number. From that the problem is made again where it is scored: the right
answers hold tuples, fractions and boards, which no column of a dataset would keep as they are.
"""

import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from fipo_trl.rewards.reasoning_gym_process import ask


if TYPE_CHECKING:  # imported where a task is loaded: it takes half a second, and `is_task` is asked of every recipe
    from datasets import DatasetDict


PREFIX = "reasoning_gym/"
DEFAULTS = {"size": 2000, "test_size": 200, "seed": 0, "examples": []}
UNUSABLE = {
    "composite": "is a mixture, whose settings are other tasks: name one of them",
    "game_of_life_halting": "has a scorer that takes any answer for right",  # in 0.1.25
}
REPEATED_IN_A_ROW = 200  # after so many problems that were there before, a task is taken to have no others

logger = logging.getLogger(__name__)


def is_task(name: str) -> bool:
    """Whether the name of a dataset is that of a task of reasoning-gym."""
    return name.startswith(PREFIX) and not os.path.exists(name)


def load_task(name: str, settings: dict | None = None, setting: str = "dataset_name") -> "DatasetDict":
    """The problems of a task, each question once, in splits `train` and `test` that share no seed and no question.

    reasoning-gym makes a problem from a random seed, which here is even for `train` and odd for `test`, whatever the
    `size` and `seed` of either. (Only `acre` draws all its problems from one seed.) Tasks with few problems make the
    same from several seeds: a question of `test` that also stands in `train` is left out, and the log says how many.
    So `test` depends on `size`, too. The problems are the same on every rank and in every run.

    The columns are `prompt` (chat, see [`task_prompt`]), `solution` (the answer as text, empty where the task has no
    single one) and `problem` (JSON, see [`fipo_trl.rewards.reasoning_gym_process.make`]), for the reward functions of
    `fipo_trl.rewards.reasoning_gym`.

    Args:
        name: `reasoning_gym/` and the name of the task.
        settings: `size` and `test_size`, the numbers of problems (2,000 and 200); `seed` (0); `examples` of
            [`task_prompt`] (none); and the task's own.
        setting: What error messages call the name.

    Raises:
        ValueError: if there is no such task, setting or value, if the task has too few problems, or if reasoning-gym
            is not installed.

    Source: https://github.com/open-thought/reasoning-gym
    """
    from datasets import Dataset, DatasetDict

    config_class = check_task(name, settings, setting)
    own = DEFAULTS | (settings or {})
    size, test_size, seed, examples = (own.pop(key) for key in DEFAULTS)
    most = 2 * (5 * max(size, test_size) + REPEATED_IN_A_ROW)  # problems that are looked at, of both splits
    first = 2 * random.Random(seed).getrandbits(30)  # some tasks take no seeds of more than 32 bits
    fields = {"task": name.removeprefix(PREFIX), "settings": own | {"seed": first, "size": most}}
    splits: dict[str, dict[str, dict]] = {}
    reports = []
    for split, wanted, numbers in [("train", size, range(0, most, 2)), ("test", test_size, range(1, most, 2))]:
        try:
            splits[split], report = draw(fields, wanted, numbers, splits.get("train", {}), f"{name}, {split}")
        except RuntimeError as error:
            values = described(config_class, own)
            raise ValueError(f"{setting}: {name} cannot make problems with {values}: {error}") from error
        reports.append(f"{split}: {report}")
        if len(splits[split]) < wanted:
            raise ValueError(
                f"{setting}: {name} has no {wanted:,} different problems for its split '{split}' with these settings "
                f"({'; '.join(reports)}). Lower size or test_size, or widen what its problems are drawn from: "
                f"{described(config_class, own)}."
            )
    logger.info(f"{name}: {'; '.join(reports)}.")
    return DatasetDict(
        {
            split: Dataset.from_list([{"prompt": task_prompt(asked, examples)} | row for asked, row in rows.items()])
            for split, rows in splits.items()
        }
    )


def draw(
    fields: dict, wanted: int, numbers: range, in_train: Collection[str], title: str
) -> tuple[dict[str, dict], str]:
    """Rows by their questions, and how many problems were made for them, in words.

    The rows are the first `wanted` new problems among those of these numbers, fewer if there are not enough.

    Raises:
        RuntimeError: if the task often fails to make one. (A few of `codeio` are broken.)
    """
    rows: dict[str, dict] = {}
    counts: Counter[str] = Counter()
    in_a_row = 0
    with tqdm(total=wanted, desc=title, unit="problem", disable=None, leave=False) as bar:
        for number in numbers:
            if len(rows) == wanted or in_a_row == REPEATED_IN_A_ROW:
                break
            problem = json.dumps(fields | {"index": number})
            try:
                question, answer = ask("make", problem)
            except RuntimeError:
                counts["failed"] += 1
                if counts["failed"] > 10 + counts["made"] / 10:
                    raise
                continue
            counts["made"] += 1
            if question in in_train or question in rows:
                counts["in_train" if question in in_train else "repeated"] += 1
                in_a_row += 1
                continue
            rows[question] = {"solution": answer, "problem": problem}
            in_a_row = 0
            bar.update()
    report = f"{counts['made']:,} made, {counts['repeated']:,} repeated, {len(rows):,} kept"
    if in_train:
        report += f", {counts['in_train']:,} left out that stand in train"
    if counts["failed"]:
        report += f", {counts['failed']:,} could not be made"
    return rows, report


def task_prompt(question: str, examples: list[list[str]]) -> list[dict]:
    """The chat that asks a question, and for its answer in the tags that reasoning-gym looks for.

    No system turn, because some chat templates refuse one, and those of Qwen2.5 and SmolLM2 have one of their own,
    with which the models were trained.

    Args:
        question: Of the task.
        examples: Pairs of a question and its answer, for a model too weak to follow words about tags: turns that come
            first, and take the place of those words.
    """
    if not examples:
        text = f"{question}\n\nThink step by step, and end with your final answer between <answer> and </answer>."
        return [{"role": "user", "content": text}]
    turns = []
    for asked, answer in examples:
        turns += [("user", asked), ("assistant", f"<answer>{answer}</answer>")]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]


def check_examples(examples):
    """Raise a `ValueError` for anything but a list of pairs of texts."""
    well_formed = isinstance(examples, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in examples)
    if not well_formed or not all(isinstance(text, str) and text.strip() for pair in examples for text in pair):
        raise ValueError(
            f"dataset_settings: examples={examples!r:.200} must be a list of pairs of texts, [[question, answer]]. "
            "Quote numbers."
        )


def config_class_of(task: str, setting: str = "dataset_name") -> type:
    """The dataclass of a task's settings.

    Raises:
        ValueError: if there is no such task, naming the nearest, or none that can be used, or reasoning-gym is not
            installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            f"{setting}: '{PREFIX}{task}' needs reasoning-gym, which is not installed. "
            'pip install ".[reasoning-gym]" in a clone, or pip install reasoning-gym.'
        )
    from reasoning_gym.factory import DATASETS  # a second to import

    if task in UNUSABLE:
        raise ValueError(f"{setting}: '{PREFIX}{task}' {UNUSABLE[task]}.")
    tasks = DATASETS.keys() - UNUSABLE.keys()
    if task not in tasks:
        nearest = difflib.get_close_matches(task, tasks, n=1)
        hint = f"Did you mean '{PREFIX}{nearest[0]}'?" if nearest else f"It has {', '.join(sorted(tasks))}."
        version = importlib.metadata.version("reasoning-gym")
        raise ValueError(f"{setting}: reasoning-gym {version} has no task '{task}'. {hint}")
    return DATASETS[task][1]


def settings_of(config_class: type) -> dict:
    """The settings of a task with their defaults, but for `size` and `seed`."""
    return {name: value for name, value in vars(config_class()).items() if name not in DEFAULTS}


def described(config_class: type, own: dict) -> str:
    """The settings of a task with their values, for an error message."""
    return ", ".join(f"{name}={value!r:.60}" for name, value in (settings_of(config_class) | own).items()) or "none"


def check_task(name: str, settings: dict | None = None, setting: str = "dataset_name") -> type:
    """The dataclass of a task's settings, which are checked. Arguments and errors are those of [`load_task`]."""
    task = name.removeprefix(PREFIX)
    config_class = config_class_of(task, setting)
    own = DEFAULTS | (settings or {})
    for key, least in [("size", 1), ("test_size", 1), ("seed", 0)]:
        value = own.pop(key)
        if type(value) is not int or value < least:
            raise ValueError(f"dataset_settings: {key}={value!r} must be a whole number, at least {least}.")
    check_examples(own.pop("examples"))
    known = settings_of(config_class)
    for name, value in own.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, [*known, *DEFAULTS], n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(
                f"dataset_settings: {PREFIX}{task} has no setting '{name}'.{hint} There are "
                f"{', '.join(DEFAULTS)}, and of the task: {described(config_class, {})}."
            )
        default = known[name]
        kinds = {float: (int, float), tuple: (list,)}.get(type(default), (type(default),))
        if default is not None and type(value) not in kinds:
            raise ValueError(
                f"dataset_settings: {name}={value!r} of {PREFIX}{task} must be of type {kinds[-1].__name__}, like its "
                f"default, {default!r}."
            )
    try:
        json.dumps(own)
        getattr(config_class(**own), "validate", lambda: None)()  # a few have none
    except Exception as error:
        raise ValueError(
            f"dataset_settings: {PREFIX}{task} does not take {own} ({error or type(error).__name__}). It is made for "
            f"{described(config_class, {})}."
        ) from error
    return config_class
