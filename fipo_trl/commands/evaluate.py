"""Evaluate a saved model, or compare two evaluations."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import PretrainedConfig

from fipo_trl.commands.status import INTERRUPTED, refuse
from fipo_trl.data.reasoning_gym import is_task
from fipo_trl.data.sources import AIME
from fipo_trl.evaluation.evaluate import EvaluationSettings, evaluate, versions_of
from fipo_trl.evaluation.problems import load_evaluation
from fipo_trl.evaluation.sampling import AT_ONCE, TOKENS_AT_ONCE
from fipo_trl.evaluation.saved_model import SavedModel
from fipo_trl.evaluation.settings import check_backend, check_sampling
from fipo_trl.evaluation.tables import compare, table
from fipo_trl.planning.paper import RESULTS
from fipo_trl.recipe.arguments import as_mapping
from fipo_trl.rewards.names import runs_programs


NOT_OF_RESULTS = ("compare", "dataset", "output_dir", "allow_unsandboxed")  # options that no answer depends on
DESCRIPTION = """Sample n answers to each of some problems, and report avg@n, cons@n and pass@k with 95% intervals.

    fipo-trl evaluate --model outputs/fipo --dataset aime24 aime25 --backend vllm
    fipo-trl evaluate --model recipes/tiny/base --dataset recipes/tiny/data --max_tokens 128 \\
        --reward recipes.tiny.running_sums.exact_answer
    fipo-trl evaluate --compare outputs/evaluate/A/aime24 outputs/evaluate/B/aime24

A model is a folder (of a trained model, a checkpoint or a LoRA adapter) or a Hub id. The defaults are the settings of
the FIPO paper. Answers are on disk, batch by batch: the same command, given again after it was killed,
goes on from them, and ends with the same results. They are in OUTPUT_DIR/DATASET: summary.json, completions.parquet,
and samples.jsonl, of which both are made.
"""


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse  # type: ignore[method-assign]  # without the usage
    parser.add_argument("--model", help="folder of a model, checkpoint or LoRA adapter, or a Hub id")
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="SOURCE",
        help="aime24, aime25, reasoning_gym/<task>, a folder, .parquet or .jsonl file, or Hub id, with the columns "
        "prompt and solution, problem and answer, those of DAPO-Math-17k or those of MBPP, DeepCoder and "
        "verifiable-coding-problems; NAME=SOURCE renames it, as in aime24=copies/aime.parquet",
    )
    parser.add_argument(
        "--dataset_settings",
        metavar="JSON",
        help="of --dataset reasoning_gym/<task>: size, test_size, seed and settings of the task, as in the training "
        "from which they are held out",
    )
    parser.add_argument("--n", type=int, default=32, help="samples per problem (32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(1.0)")
    parser.add_argument("--top_p", type=float, default=0.7, help="(0.7)")
    parser.add_argument("--max_tokens", type=int, default=20480, help="of an answer, at most (20480)")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="(transformers)")
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"answers that are sampled at once ({AT_ONCE}; with transformers fewer if they and their prompts may be "
        f"more than {TOKENS_AT_ONCE:,} tokens). Give less where memory runs out; answers depend on it a little",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (auto: as they were saved, but vLLM makes float32 bfloat16)",
    )
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model, in vLLM (1)")
    parser.add_argument(
        "--reward", default="dapo_accuracy", help="gives 1 or 0: a name or import path (dapo_accuracy)"
    )
    parser.add_argument(
        "--allow_unsandboxed",
        action="store_true",
        help="let a reward run programs of the model where no sandbox can be had",
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--output_dir", type=Path, help="(outputs/evaluate/MODEL)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders of results: B - A")
    options = parser.parse_args(arguments)
    if options.compare is not None:
        return options
    if options.model is None or options.dataset is None:
        refuse("Give --model and --dataset, or --compare with two folders of results.")
    if options.output_dir is None:
        options.output_dir = Path("outputs/evaluate", options.model.strip("/.").replace("/", "--"))
    check_sampling(options.n, options.temperature, options.top_p, names=("--n", "--temperature", "--top_p"))
    if options.dataset_settings is not None:
        options.dataset_settings = as_mapping(options.dataset_settings, "--dataset_settings")
        if len(tasks_among(options.dataset)) != 1:
            refuse("--dataset_settings is for one --dataset reasoning_gym/<task>. Give one, or remove the settings.")
    for name in ("max_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            refuse(f"--{name}={value} must be at least 1.")
    check_backend(options.backend, options.tensor_parallel_size)
    return options


def tasks_among(sources: list[str]) -> list[str]:
    """The tasks of reasoning-gym among sources of problems, without names that these may give them."""
    return [path for path in (source.rpartition("=")[2] for source in sources) if is_task(path)]


def beside(name: str, settings: dict[str, Any], config: PretrainedConfig) -> tuple[dict[str, dict], str | None]:
    """The paper's numbers on these problems for a model of this shape, `{heading: {metric: percent}}`, and a note."""
    shape = tuple(getattr(config, size, None) for size in ("hidden_size", "num_hidden_layers"))
    if settings["n"] != 32 or name not in AIME or shape not in RESULTS:
        return {}, None
    paper = RESULTS[shape]
    note = f"Paper: {paper['model']}, arXiv 2603.19835. How it estimates cons and pass, it does not say."
    return {f"paper: {method}": numbers for method, numbers in paper[name].items()}, note


def run(options: argparse.Namespace):
    """Evaluate, and print a table of each set of problems."""
    tasks = tasks_among(options.dataset)
    of_tasks = {} if options.dataset_settings is None else {tasks[0]: options.dataset_settings}
    problems, accuracy = load_evaluation(
        options.dataset,
        options.reward,
        ("--dataset", "--reward"),
        of_tasks,
        allow_unsandboxed=options.allow_unsandboxed,
    )
    if options.allow_unsandboxed and not runs_programs(accuracy):
        raise ValueError(f"--allow_unsandboxed is for a --reward that runs programs, not {options.reward}. Remove it.")
    model = SavedModel(options.model)
    modules = ["torch", "transformers"] + ["vllm"] * (options.backend == "vllm") + ["reasoning_gym"] * bool(tasks)
    given = {name: value for name, value in vars(options).items() if name not in NOT_OF_RESULTS}
    settings = EvaluationSettings(**given, versions=versions_of(modules))
    for name, summary in evaluate(model, problems, accuracy, settings, options.output_dir):
        print(table(name, summary, *beside(name, summary["settings"], model.config)))
    print(f"\nNumbers and completions: {options.output_dir}")


def main(arguments: list[str]):
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fipo_trl").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()  # of loading; that of the work stays
    datasets.disable_progress_bars()
    try:
        options = read_options(arguments)
        print(compare(*options.compare)) if options.compare else run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
