"""Run a comparison of FIPO with DAPO, all arms and seeds, and write what came out.

    python scripts/replicate.py --study tiny --jobs 2
    python scripts/replicate.py --study tiny --seeds 1 --arms DAPO "FIPO [1.0, 1.2]"

Each run is scripts/train_fipo.py, then scripts/evaluate.py, in OUTPUT_DIR/STUDY/ARM/seed-N, one CPU thread each.
Ctrl-C saves a checkpoint of those in progress; the same command goes on from there, and passes over what is done. At
the end results.json, tables.md and figures are in OUTPUT_DIR/STUDY: means over the seeds with 95% intervals, and
differences to DAPO, seed by seed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from fipo_trl.analysis.comparison import compare, draw_differences, metrics_of, table
from fipo_trl.analysis.report import Run, draw, write_report
from fipo_trl.commands.status import INTERRUPTED
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.trainer.resume import latest_checkpoint


class Study(NamedTuple):
    """Arms that are compared, the first of which is the control; what a run is evaluated by; and the usual seeds."""

    arms: dict[str, list[str]]  # arguments of train_fipo.py
    evaluation: list[str]  # arguments of evaluate.py
    seeds: range
    differences: tuple[str, ...]  # metrics whose differences to the control are drawn


# Drawn for the control and the two arms after it
CURVES = {
    "reward": "reward",
    "completions/mean_length": "mean length, tokens",
    "grad_norm": "gradient norm",
    "policy/kl": "policy KL, nats",
    "fipo/influence_weight/mean": "influence weight",
}
TINY = ["--config", "recipes/tiny/fipo_study.yaml"]
# As in the paper's ablations, which are of its 7B run: they vary FIPO with the bounds [0.8, 1.2]
WIDE = [*TINY, "--influence_weight_min", "0.8"]
STUDIES = {
    "tiny": Study(
        arms={
            "DAPO": [*TINY, "--trainer", "dapo"],
            "FIPO [1.0, 1.2]": TINY,
            "FIPO [0.8, 1.2]": WIDE,
            "no participation mask": [*WIDE, "--future_kl_participation_mask", "false"],
            "half-life 8": [*WIDE, "--future_kl_half_life", "8"],
            "half-life 128": [*WIDE, "--future_kl_half_life", "128"],
        },
        evaluation=[
            *("--dataset", "recipes/tiny/study/data", "--reward", "recipes.tiny.running_sums.exact_answer"),
            *("--max_tokens", "192", "--top_p", "1.0"),
        ],
        seeds=range(1, 6),
        differences=("avg@32", "mean_length", "updates_to_80", "grad_norm"),
    ),
    "smollm": Study(
        arms={
            "DAPO": ["--config", "recipes/SmolLM2-135M/dapo_lora.yaml"],
            "FIPO [1.0, 1.2]": ["--config", "recipes/SmolLM2-135M/fipo_lora.yaml"],
        },
        evaluation=[
            *("--dataset", "reasoning_gym/needle_haystack", "--reward", "reasoning_gym_accuracy"),
            *("--n", "8", "--max_tokens", "24", "--temperature", "0.7", "--top_p", "1.0"),
        ],
        seeds=range(1, 2),
        differences=("avg@8", "mean_length", "grad_norm"),
    ),
}


class Interrupted(Exception):
    """A run saved a checkpoint because it was told to stop."""


class Commands:
    """Runs other scripts of this folder, and stops them together. A terminal's Ctrl-C does not reach them."""

    def __init__(self):
        self.stopping = False
        self.lock = threading.RLock()  # a signal may come while this thread holds it
        self.running: set[subprocess.Popen] = set()

    def run(self, script: str, arguments: list[str], log: Path):
        """Run it to its end, with its output appended to the log.

        Raises:
            Interrupted: if it was stopped.
            RuntimeError: if it failed, with the end of its output.
        """
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
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
            raise RuntimeError(f"{script} ended with exit status {status}. The end of {log}:\n{tail(log)}")

    def stop(self):
        with self.lock:
            if not self.stopping:  # a second signal would end them without a checkpoint
                self.stopping = True
                for process in self.running:
                    process.send_signal(signal.SIGINT)


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def folder_of(root: Path, arm: str, seed: int) -> Path:
    return root / re.sub(r"[^\w.-]+", "-", arm).strip("-") / f"seed-{seed}"


def check_same(folder: Path, arguments: dict):
    """Refuse a folder with the run of other arguments or another recipe: its results would pass for these."""
    path = folder / "arguments.json"
    if path.exists() and json.loads(path.read_text()) != arguments:
        raise ValueError(
            f"{folder} holds a run of other arguments or of another recipe (see its arguments.json). Delete it, or "
            "give another --output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(arguments, indent=2) + "\n")


def arguments_of(study: Study, arm: str, seed: int) -> dict:
    """All that says what a run is: the arguments of its two commands, and the recipe."""
    train = study.arms[arm]
    recipe = Path(train[train.index("--config") + 1])
    of_task = read_and_validate(train).run.dataset_settings
    return {
        "train": [*train, "--seed", str(seed)],
        "evaluate": study.evaluation + (["--dataset_settings", json.dumps(of_task)] if of_task else []),
        "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest()[:16],
    }


def run_one(commands: Commands, folder: Path, arguments: dict):
    """Train and evaluate, as far as it is not done yet."""
    run, log = folder / "run", folder / "log.txt"
    if not (run / "trainer_state.json").exists():
        resume = ["--resume_from_checkpoint", "latest"] if latest_checkpoint(run) else []
        own = ["--output_dir", str(run), "--disable_tqdm", "true"]
        commands.run("train_fipo.py", [*arguments["train"], *own, *resume], log)
    if not list(folder.glob("evaluation/*/summary.json")):
        own = ["--model", str(run), "--output_dir", str(folder / "evaluation")]
        commands.run("evaluate.py", [*arguments["evaluate"], *own], log)


def summarise(study: Study, root: Path, arms: list[str], seeds: list[int]) -> str:
    """Write results.json, the figures and report.html of finished runs; returns the tables, in Markdown."""
    metrics, drawn = {}, {}
    for arm in arms:
        args = read_and_validate(study.arms[arm]).training
        folders = {seed: folder_of(root, arm, seed) for seed in seeds}
        drawn[arm] = [Run(folder / "run") for folder in folders.values()]
        metrics[arm] = {}
        for (seed, folder), run in zip(folders.items(), drawn[arm], strict=True):
            (summary,) = folder.glob("evaluation/*/summary.json")
            metrics[arm][seed] = metrics_of(run, summary.parent, args.derivation_pattern, args.self_check_pattern)
    compared = compare(metrics)
    results = {
        "study": root.name,
        "versions": {name: version(name) for name in ("fipo-trl", "trl", "transformers", "torch")},
        "arms": {
            arm: {
                "train": study.arms[arm],
                "runs": metrics[arm],
                **{kind: {name: list(value) for name, value in part.items()} for kind, part in compared[arm].items()},
            }
            for arm in arms
        },
        "evaluate": study.evaluation,
    }
    text = json.dumps(results, indent=1).replace("NaN", "null")
    (root / "results.json").write_text(text + "\n")
    (root / "curves.png").write_bytes(draw(CURVES, dict(list(drawn.items())[:3]), "step"))
    write_report(drawn, root / "report")
    of_them = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds; mean over them and 95% interval"
    parts = [f"{of_them}:\n\n{table(compared, 'mean')}"]
    if len(arms) > 1:
        draw_differences(compared, study.differences, root / "differences.png")
        parts.append(f"Difference to {arms[0]}, seed by seed:\n\n{table(compared, 'minus_control')}")
    (root / "tables.md").write_text("\n\n".join(parts) + "\n")
    return "\n\n".join(parts)


def run_study(study: Study, root: Path, arms: list[str], seeds: list[int], jobs: int):
    """Run all that is not done. Seeds come first: while it runs, all arms have about as many.

    Raises:
        ValueError: if there are runs of other arguments, or another process works on this study.
        RuntimeError: if a run fails. The others stop with a checkpoint.
        Interrupted: if a signal stopped it, or one of the runs.
    """
    runs = {(seed, arm): arguments_of(study, arm, seed) for seed in seeds for arm in arms}
    for (seed, arm), arguments in runs.items():
        check_same(folder_of(root, arm, seed), arguments)
    lock = open(root / "lock", "w")  # noqa: SIM115  # until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another process works on {root}. Wait for it, or give another --output_dir.") from error
    commands = Commands()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: commands.stop())
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc=root.name, unit="run") as bar:
        futures = {
            pool.submit(run_one, commands, folder_of(root, arm, seed), arguments): f"{arm}, seed {seed}"
            for (seed, arm), arguments in runs.items()
        }
        for future in as_completed(futures):
            if error := future.exception():
                commands.stop()
                pool.shutdown(cancel_futures=True)
                raise error if isinstance(error, Interrupted) else RuntimeError(f"{futures[future]}: {error}")
            bar.update()
            bar.set_postfix_str(futures[future])
    lock.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a CPU core each (1)")
    parser.add_argument("--arms", nargs="+", help="some of the arms, by name (all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(those of the study)")
    parser.add_argument("--output_dir", type=Path, default="outputs/replicate", help="(outputs/replicate)")
    options = parser.parse_args()
    study, root = STUDIES[options.study], options.output_dir / options.study
    arms, seeds = options.arms or list(study.arms), options.seeds or list(study.seeds)
    try:
        if unknown := [arm for arm in arms if arm not in study.arms]:
            raise ValueError(f"--arms: there is no '{unknown[0]}' in this study, only {', '.join(study.arms)}.")
        if options.jobs < 1:
            raise ValueError(f"--jobs={options.jobs} must be at least 1.")
        arms, seeds = list(dict.fromkeys(arms)), list(dict.fromkeys(seeds))
        run_study(study, root, arms, seeds, options.jobs)
        print(summarise(study, root, arms, seeds))
    except Interrupted:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"\nNumbers, tables and figures: {root}   All that was logged: {root / 'report/report.html'}")


if __name__ == "__main__":
    main()
