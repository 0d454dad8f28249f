"""Where data come from: the name of a dataset or of problems -> their rows.

A name is that of a local folder or file, of a dataset on the Hugging Face Hub, or `reasoning_gym/<task>`.
"""

import json
import os

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from huggingface_hub import HfApi

from fipo_trl.data.code_problems import from_code, is_code
from fipo_trl.data.dapo_math import dapo_prompt, from_dapo, is_dapo
from fipo_trl.data.reasoning_gym import is_task, load_task


AIME = {"aime24": "BytedTsinghua-SIA/AIME-2024", "aime25": "math-ai/aime25"}  # on the Hub


def load_splits(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    setting: str = "dataset_name",
    task_settings: dict | None = None,
) -> DatasetDict | IterableDatasetDict:
    """A dataset by its name, as it is: all its splits; those of a single file are `train` only.

    Args:
        name: A folder, a .parquet, .jsonl or .json file, the id of a dataset on the Hugging Face Hub, or
            `reasoning_gym/` and the name of one of its tasks.
        config: Its configuration, where it has several.
        streaming: Whether to read while training, in place of before.
        setting: What error messages call the name.
        task_settings: Of a task, see [`fipo_trl.data.reasoning_gym.load_task`].

    Raises:
        ValueError: if it cannot be loaded. A Hub that cannot be reached is found out at once, not after retries.
    """
    if is_task(name):
        if config is not None or streaming:
            raise ValueError(f"{setting}: '{name}' takes no dataset_config or dataset_streaming. Remove them.")
        return load_task(name, task_settings, setting)
    try:
        if os.path.isfile(name):
            formats = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
            ending = os.path.splitext(name)[1]
            if ending not in formats:
                raise ValueError(f"a file must end in {', '.join(formats)}")
            return load_dataset(formats[ending], data_files={"train": name}, streaming=streaming)
        if not os.path.isdir(name) and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
            HfApi().dataset_info(name, timeout=10)
        return load_dataset(name, config, streaming=streaming)
    except Exception as error:
        check_lines(name, setting)
        raise ValueError(
            f"{setting}: cannot load '{name}' ({error}). Give a local folder or file (relative to the directory "
            "you start from, or to the recipe's folder) or the id of a dataset on the Hugging Face Hub. Without a "
            "network, download it elsewhere and give the folder, or set HF_HUB_OFFLINE=1 if this machine's cache has "
            "it."
        ) from error


def check_lines(name: str, setting: str):
    """Raise a `ValueError` for the first line of a .jsonl file that is not JSON, or if the file holds none."""
    if not os.path.isfile(name) or not name.endswith(".jsonl"):
        return
    empty = True
    with open(name, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{setting}: line {number} of {name} is not valid JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{setting}: line {number} of {name} must hold one row, {{...}}, got {line[:80]!r}.")
    if empty:
        raise ValueError(f"{setting}: {name} is empty. Give a file with one row a line.")


def load_problems(
    source: str, setting: str = "dataset", task_settings: dict[str, dict] | None = None
) -> tuple[str, Dataset]:
    """Problems to evaluate on: their short name, and columns `prompt` (chat or text) and `solution` (text).

    Rows may have those columns, with others that a reward function reads; DAPO's schema (see [`from_dapo`]), or one of
    programming problems (see [`from_code`]); or `problem` and `answer`, as most copies of AIME: the problem is then
    asked in DAPO's words.

    Args:
        source: `aime24` or `aime25`, for the Hub's; a folder, file or Hub id as in [`load_splits`], of which the split
            `test` is read or the only one; or `NAME=SOURCE`, to call it something else than its last part:
            `aime24=/data/aime-2024.parquet`.
        setting: What error messages call the source.
        task_settings: Settings of tasks of reasoning-gym by the names of these, `reasoning_gym/<task>`.

    Raises:
        ValueError: if it cannot be loaded or has other columns, no rows, or a row without prompt or solution.
    """
    name, _, path = source.partition("=") if "=" in source and not os.path.exists(source) else (source, "", source)
    name = os.path.splitext(os.path.basename(name.rstrip("/")))[0]
    of_task = (task_settings or {}).get(path)
    splits = load_splits(AIME.get(path, path), setting=setting, task_settings=of_task)
    split = "test" if "test" in splits else next(iter(splits))
    if len(splits) > 1 and split != "test":
        raise ValueError(
            f"{setting}: '{path}' has the splits {', '.join(splits)}, but no 'test'. Give one file of it."
        )
    dataset = splits[split]
    columns = set(dataset.column_names)
    if is_dapo(dataset.column_names):
        dataset = from_dapo(dataset)
    elif is_code(dataset.column_names):
        dataset = from_code(dataset)
    elif not {"prompt", "solution"} <= columns:
        if not {"problem", "answer"} <= columns:
            raise ValueError(
                f"{setting}: '{path}' has the columns {', '.join(dataset.column_names)}. Problems need 'prompt' and "
                "'solution', 'problem' and 'answer', or the columns of DAPO-Math-17k."
            )
        prompts = [dapo_prompt(problem) if problem else None for problem in dataset["problem"]]
        dataset = Dataset.from_dict({"prompt": prompts, "solution": dataset["answer"][:]})
    if len(dataset) == 0:
        raise ValueError(f"{setting}: '{path}' holds no problem.")
    solutions = [str(answer) if isinstance(answer, int) else answer for answer in dataset["solution"]]
    for row, (prompt, solution) in enumerate(zip(dataset["prompt"], solutions, strict=True)):
        if not prompt or not isinstance(solution, str):
            raise ValueError(
                f"{setting}: row {row} of '{path}' (the first is 0) has prompt {prompt!r:.80} and solution "
                f"{solution!r:.80}. Both must be there, the solution as text."
            )
    return name, dataset.remove_columns("solution").add_column("solution", solutions)
