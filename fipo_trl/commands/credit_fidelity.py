"""Compare what FIPO made of tokens with their true credit."""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import transformers

from fipo_trl.analysis.credit_fidelity import TARGETS, draw, fidelity, noise, parts_of, tables
from fipo_trl.analysis.token_credit_page import CREDIT_FOLDER
from fipo_trl.analysis.true_credit import CreditSettings, Task, Trace, credit_of, policy_of, write_tokens
from fipo_trl.commands.status import INTERRUPTED, refuse
from fipo_trl.evaluation.evaluate import versions_of
from fipo_trl.evaluation.settings import check_backend
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.trainer.token_credit import read_trace, traced_steps


DESCRIPTION = """\
Does Future-KL point at the tokens that matter? It samples the true credit of tokens, V(with it) - V(before it), by
continuing answers of a token credit trace with the policy that generated them, and correlates F and f with it.

    fipo-trl train --config recipes/tiny/fipo.yaml --token_credit_every 1 --save_steps 8 --save_total_limit 40
    fipo-trl credit-fidelity --run outputs/tiny-fipo --config recipes/tiny/fipo.yaml --step 40 160 320

The policy is the checkpoint at the start of the trace's generation, so that must be kept: save_steps of the updates of
a generation. Give the recipe and the flags of the run: they say what is rewarded, and how answers are sampled. Samples
are on disk, batch by batch: the same command, given again after it was killed, goes on from them.
"""


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is the recipe's of it."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl credit-fidelity",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse  # type: ignore[method-assign]  # without the usage
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="output_dir of the run")
    parser.add_argument("--config", required=True, metavar="RECIPE", help="its recipe; flags of `train` may follow")
    parser.add_argument("--step", nargs="+", type=int, help="traces, by their last update (all whose policy is kept)")
    parser.add_argument("--policy", metavar="MODEL", help="that generated the trace of one --step (a checkpoint)")
    parser.add_argument("--answers", type=int, default=64, help="of each trace, at most (64)")
    parser.add_argument("--positions", type=int, default=16, help="of each answer, at most (16)")
    parser.add_argument("--samples", type=int, default=32, help="continuations from each state (32)")
    parser.add_argument("--parts", type=int, default=3, help="of training, whose traces are taken together (3)")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="(transformers)")
    parser.add_argument("--batch_size", type=int, help="continuations that are sampled at once (as in `evaluate`)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the policy (auto: as it was saved)",
    )
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model, in vLLM (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers, tokens and samples that are drawn (0)")
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", help="of the results (RUN/credit_fidelity)")
    options, flags = parser.parse_known_args(arguments)
    options.output_dir = options.output_dir or options.run / CREDIT_FOLDER
    for name, least in [("answers", 1), ("positions", 1), ("samples", 4), ("parts", 1), ("batch_size", 1)]:
        if (value := getattr(options, name)) is not None and value < least:
            refuse(f"--{name}={value} must be at least {least}.")
    check_backend(options.backend, options.tensor_parallel_size)
    if options.policy is not None and len(options.step or []) != 1:
        refuse("--policy is the policy of one trace. Give one --step with it.")
    return options, flags


def policies(options: argparse.Namespace, base: str | None) -> dict[int, str]:
    """The policy of each trace. Without --step, traces whose policy was not kept are left out, which is printed."""
    found, missing = {}, []
    for step in options.step or traced_steps(options.run):
        _, settings = read_trace(options.run, step)
        try:
            found[step] = options.policy or policy_of(options.run, settings, base)
        except ValueError as error:
            if options.step:
                raise
            missing.append(error)
    if not found:
        raise missing[0]
    if missing:
        print(f"Left out: {len(missing)} traces whose policy was not kept. {missing[0]}")
    return found


def run(options: argparse.Namespace, flags: list[str]):
    """Sample, correlate, write, print."""
    recipe = read_and_validate(["--config", options.config, *flags])
    of_step = policies(options, recipe.model.model_name_or_path)
    settings = CreditSettings(
        answers=options.answers,
        positions=options.positions,
        samples=options.samples,
        backend=options.backend,
        batch_size=options.batch_size,
        dtype=options.dtype,
        tensor_parallel_size=options.tensor_parallel_size,
        seed=options.seed,
        versions=versions_of(["torch", "transformers"] + ["vllm"] * (options.backend == "vllm")),
    )
    task = Task(recipe)
    traces = [Trace(options.run, step, task, settings, policy) for step, policy in sorted(of_step.items())]
    if not any(trace.positions for trace in traces):
        raise ValueError(
            "No answer of these traces has an advantage: their prompts were answered all right or all wrong. Give "
            "--step of other traces, or train with dynamic_sampling."
        )
    chosen = [places for trace in traces for places in trace.positions.values()]
    tokens, continuations = sum(map(len, chosen)), sum(len(trace.states) for trace in traces) * options.samples
    print(
        f"Traces: {len(traces)}. Answers with an advantage: {len(chosen)}. Tokens: {tokens}. "
        f"Continuations: {continuations:,}.",
        flush=True,
    )
    answers = credit_of(traces, options.output_dir)
    write_tokens(answers, options.output_dir)
    results = {part: fidelity(members) for part, members in parts_of(answers, options.parts).items()}
    draw(results, options.output_dir / "credit_fidelity.png")
    written = {"settings": asdict(settings), "steps": sorted(of_step), "parts": results}
    without_nan = json.loads(json.dumps(written), parse_constant=lambda _: None)
    (options.output_dir / "credit_fidelity.json").write_text(json.dumps(without_nan, indent=1) + "\n")
    text = "\n\n".join([noise(results), *(tables(results, target) for target in TARGETS)])
    (options.output_dir / "tables.md").write_text(text + "\n")
    print(text)
    print(f"\nNumbers, figure, and a row for each token: {options.output_dir}")


def main(arguments: list[str]):
    logging.basicConfig(format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading; that of the work stays
    datasets.disable_progress_bars()
    try:
        run(*read_options(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
