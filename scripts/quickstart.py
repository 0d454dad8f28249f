"""Evaluate a tiny base model, train it with FIPO, evaluate it again, and show what changed. No GPU, no download.

    make quickstart
    make quickstart-vllm   vLLM does the rollouts, on the CPU; their speed is reported beside that of transformers

The recipe is recipes/tiny/fipo.yaml (fipo_vllm.yaml), read as any other. Results go to
outputs/quickstart: summary.json, training.png and the report that `fipo-trl report` writes. Ctrl-C leaves a
checkpoint, from which the next run goes on.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import datasets
import torch
import transformers
from make_tiny_base import sample  # which puts the recipes on the path
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from fipo_trl.analysis.report import Run, write_report
from fipo_trl.commands.train import prepare, train
from fipo_trl.evaluation.exam import metrics_of
from fipo_trl.recipe.validate import read_and_validate
from recipes.tiny.running_sums import KINDS, kind_of_answer


RECIPE = "recipes/tiny/fipo.yaml"
SAMPLES = 8  # completions per held-out problem: avg@8


class ProgressBar(TrainerCallback):
    """One bar over the generations, with the few numbers that tell how it goes."""

    def on_train_begin(self, args, state, control, **kwargs):
        done = state.global_step // args.updates_per_generation
        total = state.max_steps / args.updates_per_generation
        self.bar = tqdm(total=int(total), initial=int(done), desc="FIPO", unit="generation", disable=None)

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            self.bar.update()
            self.bar.set_postfix_str(
                f"accuracy {logs['reward']:.2f}, length {logs['completions/mean_length']:.0f} tokens, "
                f"weights != 1: {logs['fipo/active_fraction']:.0%}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def evaluate(model, tokenizer, problems: list[str]) -> dict:
    """Sample `SAMPLES` answers to each problem at temperature 1.

    Returns:
        `avg@8` (share of right answers), `mean_length` (tokens, without the end of sequence), `behaviours` (shares).
    """
    samples = sample(model, tokenizer, problems, SAMPLES)
    metrics = {name: values.mean().item() for name, values in metrics_of(samples, has_answers=False).items()}
    seen = [kind_of_answer(each["completion"]) for row in samples for each in row]
    return {
        f"avg@{SAMPLES}": metrics[f"avg@{SAMPLES}"],
        "mean_length": metrics["mean_length"] - (1 - metrics["truncated"]),
        "behaviours": {name: seen.count(name) / len(seen) for name in KINDS},
    }


def rollout_speed(trainer) -> float:
    """Completion tokens per second over the rollouts of one generation, sampled as in training; the best of three."""
    prompts = trainer.train_dataset["prompt"][: trainer.args.generation_batch_size // trainer.num_generations]
    prompts = [prompt for prompt in prompts for _ in range(trainer.num_generations)]
    tokenized = trainer._tokenize_prompts(prompts)
    speeds = []
    for _ in range(3):  # vLLM compiles in the first
        began = time.perf_counter()
        completions, _ = trainer._generate_single_turn(*tokenized, trainer.num_generations)
        speeds.append(sum(map(len, completions)) / (time.perf_counter() - began))
    return max(speeds)


def table(base: dict, trained: dict) -> str:
    rows = [
        (f"avg@{SAMPLES} accuracy, held-out problems", base[f"avg@{SAMPLES}"], trained[f"avg@{SAMPLES}"], "{:.1%}"),
        ("mean length, tokens", base["mean_length"], trained["mean_length"], "{:.1f}"),
    ]
    rows += [
        (f"answers with {name}", base["behaviours"][name], trained["behaviours"][name], "{:.1%}") for name in KINDS
    ]
    lines = [f"{'':38}{'base':>9}{'FIPO':>9}"]
    lines += [f"{name:38}{form.format(before):>9}{form.format(after):>9}" for name, before, after, form in rows]
    return "\n".join(lines)


def draw(log_history: list[dict], path: Path):
    """Accuracy, length and influence weights over the generations, from the rows that the trainer logged."""
    rows = [row for row in log_history if "reward" in row]
    generations = range(1, len(rows) + 1)

    def column(name):
        return [row[name] for row in rows]

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    accuracy, length, weights = figure.subplots(1, 3)
    accuracy.plot(generations, column("reward"))
    accuracy.set(title="accuracy of the rollouts", ylim=(0, 1))
    length.fill_between(
        generations, column("completions/min_length"), column("completions/max_length"), alpha=0.2, label="min to max"
    )
    length.plot(generations, column("completions/mean_length"), label="mean")
    length.set(title="length of the rollouts, tokens", ylim=(0, None))
    length.legend()
    weights.fill_between(
        generations,
        column("fipo/influence_weight/min"),
        column("fipo/influence_weight/max"),
        alpha=0.2,
        label="min to max",
    )
    weights.plot(generations, column("fipo/influence_weight/mean"), label="mean")
    weights.set(title="influence weights f")
    weights.legend()
    for axis in (accuracy, length, weights):
        axis.set_xlabel("generation (8 updates each)")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=RECIPE, help=f"a recipe of the tiny task (default: {RECIPE})")
    parser.add_argument("--output_dir", type=Path, default="outputs/quickstart", help="default: outputs/quickstart")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; those of the work stay
    datasets.disable_progress_bars()
    began = time.perf_counter()

    run_dir, summary_path = options.output_dir / "run", options.output_dir / "summary.json"
    if (run_dir / "training_args.bin").exists():  # training that ran to its end starts over, interrupted one goes on
        shutil.rmtree(run_dir)
    arguments = ["--config", options.config, "--output_dir", str(run_dir), "--disable_tqdm", "true"]
    if any(run_dir.glob("checkpoint-*")):
        arguments += ["--resume_from_checkpoint", "latest"]
    try:
        recipe = read_and_validate(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")

    held_out = datasets.load_dataset(recipe.run.dataset_name, split=recipe.run.dataset_test_split)
    problems = held_out["prompt"][:]
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.model_name_or_path, dtype=torch.float32)
    print(
        f"A Qwen2 of {model.num_parameters():,} weights adds digits modulo 5: {problems[0]}{held_out['solution'][0]}\n"
        f"1/3  The base model, {SAMPLES} samples for each of {len(problems)} held-out problems ..."
    )
    base = evaluate(model, tokenizer, problems)
    print(f"     {base[f'avg@{SAMPLES}']:.1%} right\n2/3  Training with FIPO ({options.config}) ...")

    recipe, trainer, checkpoint = prepare(arguments)
    speeds = {}
    if recipe.training.use_vllm:
        _, plain, _ = prepare([*arguments, "--use_vllm", "false"])
        speeds = {"vllm": rollout_speed(trainer), "transformers": rollout_speed(plain)}
        print("     rollouts, tokens/s: " + ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar())
    if status := train(trainer, recipe, checkpoint):
        sys.exit(status)

    print("3/3  The trained model, on the same problems ...")
    trained = evaluate(trainer.model, tokenizer, problems)
    history = trainer.state.log_history
    active = [row["fipo/active_fraction"] for row in history if "fipo/active_fraction" in row]
    summary = {
        "base": base,
        "trained": trained,
        "active_fraction": mean(active),
        "updates": trainer.state.global_step,
        "rollout_tokens_per_second": speeds,
        "seconds": round(time.perf_counter() - began, 1),
    }
    summary_path.write_text(json.dumps(summary, indent=2) + "\n")
    figure_path = options.output_dir / "training.png"
    draw(history, figure_path)
    write_report({"FIPO": [Run(run_dir)]}, options.output_dir / "report")
    print(f"\n{table(base, trained)}\n")
    print(
        f"FIPO acted on {summary['active_fraction']:.0%} of the tokens (an influence weight other than 1), in "
        f"{summary['updates']} updates. All took {summary['seconds']:.0f} s.\n"
        f"Curves: {figure_path}   All that was logged: {options.output_dir / 'report/report.html'}\n"
        f"Numbers: {summary_path}   Model: {run_dir}"
    )


if __name__ == "__main__":
    main()
