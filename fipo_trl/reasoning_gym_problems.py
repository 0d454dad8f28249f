"""Problems of reasoning-gym: its procedural tasks in logic, games, code, algorithms, ... as rows to train on.

A problem is named by its task, the task's settings and its number, from which it is made again where it is scored:
its right answers hold tuples, fractions and boards that no column of a dataset would keep.
"""

import difflib
import functools
import importlib.util
import json
import logging
import os
import random
import sys

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm


PREFIX = "reasoning_gym/"
DEFAULTS = {"size": 2000, "test_size": 200, "seed": 0}
REPEATED_IN_A_ROW = 200  # after so many problems that are known already, a task is taken to have no others
# Their problems depend on the order of sets of strings, which differs from one Python process to the next
ORDERED_BY_HASH = {
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}

logger = logging.getLogger(__name__)


def load_task(name: str, settings: dict | None = None, setting: str = "dataset_name") -> DatasetDict:
    """Problems of one task, each question once: splits `train` and `test` that share neither seeds nor questions.

    The columns are `prompt` (chat, see [`task_prompt`]), `solution` (the answer as text, empty where the task has no
    single one) and `problem` (text, see [`entry_of`]). reasoning-gym makes each problem from a random seed of its own:
    here even ones for `train` and odd ones for `test`, so that they differ whatever the `size` and `seed` of each.
    `seed` says where both begin. (`acre` alone draws all its problems from one seed.) A question of `test` that also
    stands in `train` is left out; how many is in the log.

    Args:
        name: `reasoning_gym/` and the name of the task.
        settings: `size` and `test_size`, the numbers of problems (2,000 and 200), `seed` (0), and settings of the task.
        setting: What error messages call the name.

    Raises:
        ValueError: if there is no such task, setting or value; if the task has too few problems; or if reasoning-gym
            is not installed.
    """
    task = name.removeprefix(PREFIX)
    config_class = config_class_of(task, setting)
    chosen = DEFAULTS | (settings or {})
    sizes = {}
    for key, least in [("size", 1), ("test_size", 1), ("seed", 0)]:
        sizes[key] = value = chosen.pop(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"dataset_settings: {key}={value!r} must be a whole number, at least {least}.")
    check_settings(task, chosen, config_class)
    most = 2 * (5 * max(sizes["size"], sizes["test_size"]) + REPEATED_IN_A_ROW)  # problems that are looked at
    first = 2 * random.Random(sizes["seed"]).getrandbits(30)  # NumPy takes no seeds above 2**32
    settings = chosen | {"seed": first, "size": most}

    splits, questions, counts = {}, set(), []
    for split, size, parity in [("train", sizes["size"], 0), ("test", sizes["test_size"], 1)]:
        rows, in_train, drawn, in_a_row, of_split = [], 0, 0, 0, set()
        for index in tqdm(range(parity, most, 2), desc=f"{task}, {split}", unit="problem", disable=None, leave=False):
            if len(rows) == size or in_a_row == REPEATED_IN_A_ROW:
                break
            problem = json.dumps({"task": task, "settings": settings, "index": index})
            try:
                entry = entry_of(problem)
            except Exception as error:
                raise ValueError(
                    f"{name} cannot make a problem with {chosen or 'its default settings'}: {error!r}"
                ) from error
            drawn += 1
            question = entry["question"]
            if question in questions or question in of_split:
                in_a_row += 1
                in_train += question in questions
                continue
            in_a_row = 0
            of_split.add(question)
            answer = entry["answer"]
            rows.append((task_prompt(question), "" if answer is None else str(answer), problem))
        counts.append(f"{split}: {drawn:,} made, {drawn - len(rows) - in_train:,} repeated, {len(rows):,} kept")
        if split == "test":
            counts[-1] += f", {in_train:,} left out that stand in train"
        if len(rows) < size:
            key = "size" if split == "train" else "test_size"
            raise ValueError(
                f"{name} has too few problems for {key}={size} ({'; '.join(counts)}). Lower size or test_size, or "
                f"widen a setting of the task: {described(config_class, chosen)}."
            )
        questions |= of_split
        columns = zip(*rows, strict=True)
        splits[split] = Dataset.from_dict(dict(zip(("prompt", "solution", "problem"), columns, strict=True)))
    logger.info(f"{name}: {'; '.join(counts)}.")
    return DatasetDict(splits)


def is_task(name: str) -> bool:
    """Whether a dataset's name names a task of reasoning-gym."""
    return name.startswith(PREFIX) and not os.path.exists(name)


def task_prompt(question: str) -> list[dict]:
    """The chat that asks a question and for its answer in tags, one user turn.

    The words about the tags stand there, and not in a system turn, because some chat templates refuse one, and those
    of Qwen2.5 and SmolLM2 have a system turn of their own, with which the models were trained.
    """
    text = f"{question}\n\nThink step by step, and end with your final answer between <answer> and </answer>."
    return [{"role": "user", "content": text}]


@functools.cache
def dataset_of(task: str, settings: str):
    """The `ProceduralDataset` of a task with its settings, as JSON."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(settings))


@functools.cache
def entry_of(problem: str) -> dict:
    """What reasoning-gym made: `question`, `answer` and `metadata`. The same text gives the same entry.

    Args:
        problem: JSON with `task`, its `settings`, `seed` and `size` of reasoning-gym included, and `index`.
    """
    fields = json.loads(problem)
    return dataset_of(fields["task"], json.dumps(fields["settings"]))[fields["index"]]


def config_class_of(task: str, setting: str = "dataset_name") -> type:
    """The dataclass of a task's settings.

    Raises:
        ValueError: if there is no such task, naming the nearest, or it cannot be used here.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            f"{setting}: '{PREFIX}{task}' needs reasoning-gym, which is not installed. "
            'pip install "fipo-trl[reasoning-gym]"'
        )
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    tasks = DATASETS.keys() - {"composite"}  # a mixture, whose settings are other tasks
    if task not in tasks:
        nearest = difflib.get_close_matches(task, tasks, n=1)
        hint = f" Did you mean '{PREFIX}{nearest[0]}'?" if nearest else f" It has {', '.join(sorted(tasks))}."
        raise ValueError(f"{setting}: reasoning-gym {reasoning_gym.__version__} has no task '{task}'.{hint}")
    if task in ORDERED_BY_HASH and sys.flags.hash_randomization:
        raise ValueError(
            f"{setting}: the problems of '{PREFIX}{task}' differ from one Python process to the next unless these "
            "are started with the environment variable PYTHONHASHSEED=0. Set it (the key env of a recipe is too late)."
        )
    return DATASETS[task][1]


def settings_of(config_class: type) -> dict:
    """The settings of a task with their defaults."""
    return {name: value for name, value in vars(config_class()).items() if name not in ("seed", "size")}


def described(config_class: type, chosen: dict) -> str:
    """The settings of a task with their values, for an error message."""
    return ", ".join(f"{name}={value!r:.60}" for name, value in (settings_of(config_class) | chosen).items()) or "none"


def check_settings(task: str, chosen: dict, config_class: type):
    """Raise a `ValueError` for settings that a task does not have or take."""
    known = settings_of(config_class)
    for name, value in chosen.items():
        if name not in known:
            raise ValueError(
                f"dataset_settings: {PREFIX}{task} has no setting '{name}'. It has size, test_size and seed, and "
                f"{described(config_class, {})}."
            )
        kinds = {int: (int,), float: (int, float), tuple: (list, tuple)}.get(type(known[name]), (type(known[name]),))
        if known[name] is not None and type(value) not in kinds:
            raise ValueError(
                f"dataset_settings: {name}={value!r} of {PREFIX}{task} must be of the type of its default, "
                f"{known[name]!r}."
            )
    try:
        json.dumps(chosen)
        config_class(**chosen).validate()
    except Exception as error:
        raise ValueError(
            f"dataset_settings: {PREFIX}{task} does not take {chosen} ({error or type(error).__name__}). Its settings "
            f"are {described(config_class, {})}."
        ) from error
