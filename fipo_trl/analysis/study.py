"""Arms and seeds: each run is trained and evaluated by processes of its own, then all are compared with the control.

A run lies in FOLDER/ARM/seed-N: its training in `run`, its answers in `evaluation`, what both printed in `log.txt`,
and in `arguments.json` all that says what it is. What is done is passed over, so the same study goes on after it was
stopped.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import cycle, islice, takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from fipo_trl.recipe.read import names_of
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.trainer.resume import TRAINER_STATE_NAME, latest_checkpoint


INTERRUPTED = 128 + signal.SIGINT  # exit status of a process that stopped because it was told to, and can go on
OWN = {"seed", "output_dir", "resume_from_checkpoint"}  # settings that a study gives to each of its runs


class Study(NamedTuple):
    """Arms that are compared, the first of which is the control.

    Attributes:
        arms: Each either the arguments of `fipo-trl train`, without those in `OWN`, by which it is trained with every
            seed; or its finished runs, `{seed: folder}`.
        evaluation: Arguments of `fipo-trl evaluate` by which the runs are evaluated, `--dataset` first; empty where
            they are not.
        seeds: Of the arms that are trained.
        differences: Metrics whose differences to the control are drawn; see `study_results.py`.
        endpoints: Metrics that are tested, see [`compare_endpoints`]; named before anything runs.
    """

    arms: Mapping[str, list[str] | dict[int, Path]]
    evaluation: list[str]
    seeds: Sequence[int] = ()
    differences: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()

    @property
    def problems(self) -> int:
        """How many sets of problems the runs are evaluated on."""
        return len(list(takewhile(lambda word: not word.startswith("--"), self.evaluation[1:])))

    def seeds_of(self, arm: str) -> list[int]:
        words = self.arms[arm]
        return sorted(words) if isinstance(words, dict) else list(dict.fromkeys(self.seeds))


class Task(NamedTuple):
    """One run of a study.

    Attributes:
        folder: Where it lies.
        run: The folder of its training: within `folder`, or that of a finished run.
        arguments: All that says what it is: the arguments of its commands, and its recipe or its finished run.
        on_gpu: Whether it has one GPU, or else one thread of the CPU.
    """

    folder: Path
    run: Path
    arguments: dict
    on_gpu: bool


class Interrupted(Exception):
    """A run saved a checkpoint because it was told to stop."""


class Commands:
    """Runs commands of this package, and stops them together. A terminal's Ctrl-C does not reach them."""

    def __init__(self):
        self.stopping = False
        self.lock = threading.RLock()  # a signal may come while this thread holds it
        self.running: set[subprocess.Popen] = set()
        self.gpus: SimpleQueue[str] = SimpleQueue()  # one for each of the runs that may start now

    def run(self, name: str, words: list[str], log: Path, environment: dict[str, str]):
        """Run `python -m WORDS` to its end, with its output appended to the log.

        Args:
            name: What messages call it.
            environment: Variables that are set beside those of this process.

        Raises:
            Interrupted: if it was stopped.
            RuntimeError: if it failed, with the end of its output.
        """
        command = [sys.executable, "-m", *words]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"} | environment
        with open(log, "ab") as file:
            with self.lock:
                if self.stopping:
                    raise Interrupted
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                self.running.add(process)
            status = process.wait()
            self.running.discard(process)
        if status == INTERRUPTED or (status and self.stopping):
            raise Interrupted
        if status:
            raise RuntimeError(f"{name} ended with exit status {status}. The end of {log}:\n{tail(log)}")

    def stop(self):
        with self.lock:
            if not self.stopping:  # a second signal would end them without a checkpoint
                self.stopping = True
                for process in self.running:
                    process.send_signal(signal.SIGINT)


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def folder_name(arm: str) -> str:
    return re.sub(r"[^\w.-]+", "-", arm).strip("-.")


def tasks_of(study: Study, root: Path) -> dict[tuple[int, str], Task]:
    """The runs of a study by seed and arm. Seeds come first: while it runs, all arms have about as many.

    Raises:
        ValueError: for what a recipe's first two steps refuse, for a setting in `OWN`, for arms whose names do not
            give folders of their own.
    """
    taken = {"": "the study", "lock": "its lock", "report": "its report"}
    for arm in study.arms:
        name = folder_name(arm)
        if name in taken:
            raise ValueError(f"The arm '{arm}' would lie in {root / name}, as {taken[name]} does. Rename the arm.")
        taken[name] = f"the arm '{arm}'"
    tasks = {}
    for arm, words in study.arms.items():
        recipe = read_and_validate(words) if isinstance(words, list) else None
        if isinstance(words, list) and (own := sorted(names_of(words) & OWN)):
            raise ValueError(f"The arm '{arm}' sets --{own[0]}, which is another for each of its runs. Remove it.")
        evaluation = list(study.evaluation)
        of_task = recipe.run.dataset_settings if recipe and recipe.run.dataset_name in evaluation else None
        if of_task and "--dataset_settings" not in evaluation:
            evaluation += ["--dataset_settings", json.dumps(of_task)]
        on_gpu = torch.cuda.is_available() and not (recipe and recipe.training.use_cpu)
        for seed in study.seeds_of(arm):
            folder = root / folder_name(arm) / f"seed-{seed}"
            if isinstance(words, list):
                run = folder / "run"
                path = Path(words[words.index("--config") + 1])
                arguments = {
                    "train": [*words, "--seed", str(seed)],
                    "evaluate": evaluation,
                    "recipe_sha256": digest(path),
                }
            else:
                run = words[seed]
                state = run / TRAINER_STATE_NAME
                arguments = {"run": str(run), "evaluate": evaluation, "state_sha256": digest(state)}
            tasks[seed, arm] = Task(folder, run, arguments, on_gpu)
    return dict(sorted(tasks.items(), key=lambda item: item[0][0]))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def check_same(task: Task):
    """Raise a `ValueError` for a folder with the run of other arguments or another recipe: it would pass for this."""
    path = task.folder / "arguments.json"
    there = json.loads(path.read_text()) if path.exists() else task.arguments
    if there not in (task.arguments, task.arguments | {"evaluate": []}):  # the second has yet to be evaluated
        raise ValueError(
            f"{task.folder} holds a run of other arguments or of another recipe (see its arguments.json). Delete it, "
            "or give another --output_dir."
        )


def begin(task: Task):
    """Say in its folder what a run is. Errors are those of [`check_same`]."""
    check_same(task)
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "arguments.json").write_text(json.dumps(task.arguments, indent=2) + "\n")


def evaluations_of(task: Task) -> list[Path]:
    """The folders of its finished evaluations."""
    return sorted(path.parent for path in task.folder.glob("evaluation/*/summary.json"))


def is_done(task: Task, problems: int) -> bool:
    """Whether it is trained, and evaluated on so many sets of problems."""
    return (task.run / TRAINER_STATE_NAME).exists() and len(evaluations_of(task)) >= problems


def run_one(commands: Commands, task: Task, problems: int):
    """Train and evaluate, as far as it is not done yet.

    Args:
        problems: How many sets of problems it is evaluated on.
    """
    log, train = task.folder / "log.txt", task.arguments.get("train")
    gpu = commands.gpus.get() if task.on_gpu else None
    environment = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {"OMP_NUM_THREADS": "1"}
    try:
        if train and not (task.run / TRAINER_STATE_NAME).exists():
            resume = ["--resume_from_checkpoint", "latest"] if latest_checkpoint(task.run) else []
            own = ["--output_dir", str(task.run), "--disable_tqdm", "true"]
            commands.run("train", ["fipo_trl.commands.train", *train, *own, *resume], log, environment)
        if len(evaluations_of(task)) < problems:
            own = ["--model", str(task.run), "--output_dir", str(task.folder / "evaluation")]
            commands.run("evaluate", ["fipo_trl", "evaluate", *task.arguments["evaluate"], *own], log, environment)
    finally:
        if gpu:
            commands.gpus.put(gpu)


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the GPUs of this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def run_study(study: Study, root: Path, jobs: int):
    """Run all that is not done, on the CPU with one thread each, else with one GPU each.

    Raises:
        ValueError: if there are runs of other arguments, or another process works in this folder; see [`tasks_of`].
        RuntimeError: if a run fails. The others stop with a checkpoint.
        Interrupted: if a signal stopped it, or one of the runs.
    """
    tasks = tasks_of(study, root)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:  # until this ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process works on {root}. Wait for it, or give another --output_dir.") from error
        wanted = {key: task for key, task in tasks.items() if "train" in task.arguments or study.evaluation}
        for task in wanted.values():
            begin(task)
        commands = Commands()
        for gpu in islice(cycle(visible_gpus()), jobs):  # where there are more runs than GPUs, they share them
            commands.gpus.put(gpu)
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, lambda *_: commands.stop()) for number in signals}
        try:
            run_all(commands, wanted, study.problems, root.name, jobs)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run_all(commands: Commands, tasks: dict[tuple[int, str], Task], problems: int, name: str, jobs: int):
    """Run the tasks, so many at a time, under a progress bar of this name. Errors are those of [`run_study`]."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), desc=name, unit="run", disable=not tasks) as bar:
        futures = {
            pool.submit(run_one, commands, task, problems): f"{arm}, seed {seed}"
            for (seed, arm), task in tasks.items()
        }
        for future in as_completed(futures):
            if error := future.exception():
                commands.stop()
                pool.shutdown(cancel_futures=True)
                raise error if isinstance(error, Interrupted) else RuntimeError(f"{futures[future]}: {error}")
            bar.update()
            bar.set_postfix_str(futures[future])
