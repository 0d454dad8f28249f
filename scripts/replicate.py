"""Comparisons whose results are in recipes/: what `fipo-trl compare` does, with their arms.

    python scripts/replicate.py --study tiny --jobs 2
    python scripts/replicate.py --study tiny --seeds 1 --arms DAPO "FIPO [1.0, 1.2]"

Each run lies in OUTPUT_DIR/STUDY/ARM/seed-N. Ctrl-C saves a checkpoint of those in progress; the same command goes on
from there, and passes over what is done. At the end results.json, tables.md and figures are in OUTPUT_DIR/STUDY.

    python scripts/replicate.py --study tiny --summarise
    python scripts/replicate.py --study tiny --merge A/results.json B/results.json --output_dir outputs/merged

The first summarises the runs that are finished, also while others go on. The second takes together what several
machines made of other seeds or other arms.
"""

import argparse
import sys
from pathlib import Path

from fipo_trl.analysis.study import Study
from fipo_trl.analysis.study_results import merge, summarise
from fipo_trl.commands.compare import run_and_print


TINY = ["--config", "recipes/tiny/fipo_study.yaml"]
# 530 prompts and 80 generations of 16, the ratio of the paper's 32B run; difficulty is spread, as in a real dataset
SKIP = [*("--config", "recipes/tiny/fipo_dynamic.yaml"), *("--max_steps", "640"), *("--learning_rate", "5e-5")]
SKIP += ["--model_name_or_path", "recipes/tiny/study/base", "--dataset_name", "recipes/tiny/skip/data"]
SKIP += ["--reward_funcs", "recipes.tiny.running_sums.exact_chain", "--dynamic_sampling_reward", "exact_chain"]
SKIP += ["--max_completion_length", "64"]
# As in the paper's ablations, which are of its 7B run: they vary FIPO with the bounds [0.8, 1.2]
WIDE = [*TINY, "--influence_weight_min", "0.8"]
# Their weights are in the study's controls
CALIBRATED = ["--config", "recipes/calibrated/fipo.yaml"]
CONTROLS = "recipes.calibrated.controls."
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
    "skip": Study(
        arms={"auto": SKIP, "skip": [*SKIP, "--dynamic_sampling_skip", "true"]},
        evaluation=[
            *("--dataset", "recipes/tiny/skip/data", "--reward", "recipes.tiny.running_sums.exact_chain"),
            *("--max_tokens", "64", "--top_p", "1.0"),
        ],
        seeds=range(1, 6),
        differences=("prompts_sampled", "avg@32", "mean_length", "seconds"),
    ),
    "calibrated": Study(
        arms={
            "DAPO": [*CALIBRATED, "--trainer", "dapo"],
            "FIPO [1.0, 1.2]": [*CALIBRATED, "--influence_weight_min", "1.0"],
            "FIPO [0.8, 1.2]": CALIBRATED,
            "half-life 6": [*CALIBRATED, "--future_kl_half_life", "6"],
            "shuffled weights": [*CALIBRATED, "--trainer", f"{CONTROLS}ShuffledWeightsTrainer"],
            "constant weight": [*CALIBRATED, "--trainer", f"{CONTROLS}ConstantWeightTrainer"],
            "oracle": [*CALIBRATED, "--trainer", f"{CONTROLS}OracleTrainer"],
        },
        evaluation=[
            *("--dataset", "recipes/calibrated/data", "--reward", "recipes.tiny.running_sums.exact_answer"),
            *("--n", "4", "--max_tokens", "352", "--top_p", "1.0"),
        ],
        seeds=range(1, 17),
        differences=("reward", "avg@4", "mean_length"),
        endpoints=("reward", "avg@4", "mean_length"),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a CPU core each (1)")
    parser.add_argument("--arms", nargs="+", help="some of the arms, by name (all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(those of the study)")
    parser.add_argument("--output_dir", type=Path, default="outputs/replicate", help="(outputs/replicate)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--summarise", action="store_true", help="run nothing: summarise what is finished")
    instead.add_argument(
        "--merge", nargs="+", type=Path, metavar="RESULTS", help="run nothing: merge the results.json of parts"
    )
    options = parser.parse_args()
    study = STUDIES[options.study]
    arms = options.arms or list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        sys.exit(f"error: --arms: there is no '{unknown[0]}' in this study, only {', '.join(study.arms)}.")
    study = study._replace(arms={arm: study.arms[arm] for arm in arms}, seeds=options.seeds or study.seeds)
    root = options.output_dir / options.study
    if not (options.merge or options.summarise):
        run_and_print(study, root, options.jobs)
        return
    try:
        print(merge(study, options.merge, root) if options.merge else summarise(study, root))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
