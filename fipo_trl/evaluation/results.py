"""What an evaluation leaves in its folder: settings.json and samples.jsonl as it goes, of which the rest is made."""

import fcntl
import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from datasets import Dataset

from fipo_trl.evaluation.exam import Sample, metrics_of
from fipo_trl.evaluation.statistics import bootstrap, quartiles


def open_results(folder: Path, settings: dict) -> tuple[dict[int, list[Sample]], BinaryIO]:
    """What is there already, `{problem: its samples}`, and the file to append to, which the caller closes.

    Raises:
        ValueError: if another process appends to it, or it was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "samples.jsonl", "a+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"Another process is evaluating into {folder}. Wait for it, or give another --output_dir."
        ) from error
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # the process was killed while it wrote this line
        file.truncate(sum(map(len, lines[:-1])))
        lines.pop()
    path = folder / "settings.json"
    if lines:
        there = json.loads(path.read_text())
        for name in sorted(settings.keys() | there.keys()):
            if settings.get(name) != there.get(name):
                raise ValueError(
                    f"{folder} holds results with another '{name}': {there.get(name)}, not {settings.get(name)}. "
                    "They cannot be mixed. Give another --output_dir, or delete that folder."
                )
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")
    rows = map(json.loads, lines)
    return {row["problem"]: row["samples"] for row in rows}, file


def append(file: BinaryIO, samples: dict[int, list[Sample]]):
    """Write the samples of some problems; they are on disk when it returns."""
    for problem, row in samples.items():
        file.write(json.dumps({"problem": problem, "samples": row}).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def write_results(folder: Path, settings: dict, dataset: Dataset, samples: list[list[Sample]]) -> dict:
    """Write completions.parquet, then summary.json, and return the summary."""
    rows = [
        {"problem": problem, "sample": number, "prompt": row["prompt"], "solution": row["solution"]} | sample
        for problem, row in enumerate(dataset)
        for number, sample in enumerate(samples[problem])
    ]
    Dataset.from_list(rows).to_parquet(folder / "completions.parquet")
    intervals = bootstrap(metrics_of(samples, settings["has_answers"]))
    summary = {
        "settings": settings,
        "metrics": {name: interval._asdict() for name, interval in intervals.items()},
        "length_quartiles": quartiles([[sample["length"] for sample in row] for row in samples]),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def read_pair(a: Path, b: Path) -> list[tuple[dict, dict[str, np.ndarray]]]:
    """The settings of two finished evaluations of the same problems, and their metrics, problem by problem.

    Raises:
        ValueError: if one is not finished, or they are of different problems, rewards or numbers of samples.
    """
    for folder in (a, b):
        if not (folder / "summary.json").exists():
            raise ValueError(
                f"--compare: {folder} holds no summary.json. Give the folder of one dataset of a finished evaluation, "
                "such as outputs/evaluate/MODEL/aime24."
            )
    of_a, of_b = (json.loads((folder / "settings.json").read_text()) for folder in (a, b))
    for name, needed in [
        ("problems_sha256", "the same problems"),
        ("n", "equally many samples"),
        ("reward", "one reward"),
    ]:
        if of_a[name] != of_b[name]:
            raise ValueError(f"--compare needs {needed}, but '{name}' is {of_a[name]} in {a} and {of_b[name]} in {b}.")
    pair = []
    for folder, settings in ((a, of_a), (b, of_b)):
        rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        samples = [row["samples"] for row in sorted(rows, key=lambda row: row["problem"])]
        pair.append((settings, metrics_of(samples, of_a["has_answers"])))
    return pair
