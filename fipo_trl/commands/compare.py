"""Train and evaluate several arms and seeds, or compare finished runs."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from fipo_trl.analysis.report import find_arms
from fipo_trl.analysis.study import INTERRUPTED, Interrupted, Study, run_study
from fipo_trl.analysis.study_results import summarise
from fipo_trl.data.reasoning_gym import is_task
from fipo_trl.evaluation.problems import load_evaluation
from fipo_trl.trainer.resume import TRAINER_STATE_NAME


DESCRIPTION = """\
Compare arms with the first of them, the control, over seeds: means with 95% intervals, and differences seed by seed.

    fipo-trl compare 'DAPO=recipes/tiny/fipo.yaml --trainer dapo' 'FIPO=recipes/tiny/fipo.yaml' --seeds 1 2 3 \\
        --jobs 2 --dataset recipes/tiny/data --reward recipes.tiny.running_sums.exact_answer --n 8 --max_tokens 128
    fipo-trl compare 'DAPO=outputs/dapo-seed*' 'FIPO=outputs/fipo-seed*'

An arm is NAME=RECIPE.yaml, with flags of `fipo-trl train` behind it, which is trained with every seed; or it is
NAME=PATTERN, finished runs, which are only compared. Both are evaluated if --dataset is given. Each training is one
process, with one thread of the CPU or one GPU. Ctrl-C saves a checkpoint of those in progress (exit status 130), and
the same command goes on from there. At the end OUTPUT_DIR holds tables.md, results.json, figures, report/report.html.
"""
EVALUATION = {  # flags of `fipo-trl evaluate`, whose defaults they have
    "reward": "gives 1 where an answer is right, or 0",
    "dataset_settings": "JSON, of --dataset reasoning_gym/<task>; default: the recipe's",
    "n": "samples per problem",
    "temperature": "of the samples",
    "top_p": "of the samples",
    "max_tokens": "of an answer, at most",
    "backend": "transformers or vllm",
}


def read_arm(argument: str) -> tuple[str, list[str] | dict[int, Path]]:
    """An arm's name, and what [`Study`] takes for it.

    Raises:
        ValueError: if it names neither a recipe nor finished runs, or two runs of one seed.
    """
    name, equals, value = argument.partition("=")
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"'{argument}': {error}.") from error
    if equals and words and words[0].endswith((".yaml", ".yml")):
        return name, ["--config", *words]
    if argument.split()[0].endswith((".yaml", ".yml")):
        raise ValueError(f"'{argument}' is an arm without a name. Write it as NAME={argument}.")
    ((name, runs),) = find_arms([argument]).items()
    for run in runs:
        if not (run.folder / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"{run.folder} is not finished: only its checkpoints have a {TRAINER_STATE_NAME}.")
    found = [re.findall(r"seed[-_]?(\d+)", str(run.folder)) for run in runs]
    seeds = [int(numbers[-1]) for numbers in found] if all(found) else range(1, len(runs) + 1)
    if len(set(seeds)) < len(runs):
        raise ValueError(f"'{argument}' names two runs of one seed: {', '.join(str(run.folder) for run in runs)}.")
    return name, {seed: run.folder for seed, run in zip(seeds, runs, strict=True)}


def read_study(arguments: list[str]) -> tuple[Study, Path, int]:
    """The command line: the study, its folder, and how many runs at a time.

    Raises:
        ValueError: for what is no arm, what does nothing, and problems or a reward that cannot be loaded.
    """
    parser = argparse.ArgumentParser(
        prog="fipo-trl compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arms", nargs="+", metavar="ARM", help="NAME='RECIPE.yaml [flags]' or NAME=PATTERN")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the recipes' runs (1 2 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a CPU core or a GPU each (1)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="(outputs/compare)")
    group = parser.add_argument_group("held-out problems", "as in `fipo-trl evaluate`, which says more")
    group.add_argument("--dataset", nargs="+", metavar="SOURCE", help="aime24, a folder, file or Hub id, ...")
    for name, meaning in EVALUATION.items():
        group.add_argument(f"--{name}", help=meaning)
    options = parser.parse_args(arguments)

    arms = {}
    for argument in options.arms:
        name, arm = read_arm(argument)
        if name in arms:
            raise ValueError(f"'{argument}': a second arm {name}. Give it another name.")
        arms[name] = arm
    if options.seeds and not any(isinstance(arm, list) for arm in arms.values()):
        raise ValueError("--seeds does nothing: no arm is a recipe. Remove it.")
    given = {name: getattr(options, name) for name in EVALUATION if getattr(options, name) is not None}
    if given and not options.dataset:
        raise ValueError(f"--{next(iter(given))} does nothing without --dataset. Give one, or remove it.")
    evaluation = []
    if options.dataset:
        evaluation = ["--dataset", *options.dataset]
        evaluation += [word for name, value in given.items() for word in (f"--{name}", value)]
        # Before hours of training
        sources = [source for source in options.dataset if not is_task(source.rpartition("=")[2])]
        load_evaluation(sources, given.get("reward", "dapo_accuracy"), ("--dataset", "--reward"))
    return Study(arms, evaluation, options.seeds or (1, 2, 3)), options.output_dir, options.jobs


def run_and_print(study: Study, root: Path, jobs: int):
    """Run all that is not done, and print the tables. Ends the process with 1 for what is refused or fails, and with
    `INTERRUPTED` after a signal."""
    try:
        if jobs < 1:
            raise ValueError(f"--jobs={jobs} must be at least 1.")
        run_study(study, root, jobs)
        print(summarise(study, root))
    except Interrupted:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"\nNumbers, tables and figures: {root}   All that was logged: {root / 'report/report.html'}")


def main(arguments: list[str]):
    """Run a comparison and print its tables."""
    try:
        study = read_study(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    run_and_print(*study)
