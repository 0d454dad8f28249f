"""What the runs of a study have in common and where they differ: results.json, tables and figures.

results.json holds all that the tables are made of, and what each run is. So it may be made of the runs that are
finished so far, and the parts that several machines ran can be merged.
"""

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fipo_trl.analysis.comparison import (
    MIN_SEEDS,
    compare,
    compare_endpoints,
    curves_of,
    draw_curves,
    draw_differences,
    endpoint_table,
    metrics_of,
    table,
)
from fipo_trl.analysis.report import Run, draw, write_report
from fipo_trl.analysis.study import Study, check_same, evaluations_of, is_done, tasks_of
from fipo_trl.recipe.validate import read_and_validate


# Drawn for the control and the two arms after it
CURVES = {
    "reward": "reward",
    "completions/mean_length": "mean length, tokens",
    "grad_norm": "gradient norm",
    "policy/kl": "policy KL, nats",
    "fipo/influence_weight/mean": "influence weight",
}
SAME = ("study", "versions", "evaluate")  # in all parts of a study


def summarise(study: Study, root: Path) -> str:
    """Write results.json, tables.md, the figures and report.html of what is finished; returns the tables, in Markdown.

    Raises:
        ValueError: for a run of other arguments, where nothing of the control is finished, and for an endpoint that no
            run has.
    """
    done = {key: task for key, task in tasks_of(study, root).items() if is_done(task, study.problems)}
    arms, drawn = {}, {}
    for arm, words in study.arms.items():
        of_arm = {seed: done[seed, arm] for seed in study.seeds_of(arm) if (seed, arm) in done}
        if not of_arm:
            continue
        args = read_and_validate(words).training if isinstance(words, list) else None
        patterns = (args.derivation_pattern, args.self_check_pattern) if args else ()
        for task in of_arm.values():
            check_same(task)
        runs = {seed: Run(task.run) for seed, task in of_arm.items()}
        drawn[arm] = list(runs.values())
        if isinstance(words, list):
            what = {"train": words, "recipe_sha256": next(iter(of_arm.values())).arguments["recipe_sha256"]}
        else:
            what = {"folders": [str(task.run) for task in of_arm.values()]}
        metrics = {
            seed: metrics_of(run, evaluations_of(of_arm[seed]) if study.evaluation else [], *patterns)
            for seed, run in runs.items()
        }
        arms[arm] = what | {"runs": metrics, "curves": {seed: curves_of(run) for seed, run in runs.items()}}
    versions = {name: version(name) for name in ("fipo-trl", "trl", "transformers", "torch")}
    results = {"study": root.name, "versions": versions, "arms": arms, "evaluate": study.evaluation}
    text = write_results(study, results, root)
    every_run = [run for members in drawn.values() for run in members]
    curves = {metric: title for metric, title in CURVES.items() if any(run.has(metric) for run in every_run)}
    if curves:
        (root / "curves.png").write_bytes(draw(curves, dict(list(drawn.items())[:3]), "step"))
    write_report(drawn, root / "report")
    return text


def write_results(study: Study, results: dict, root: Path) -> str:
    """Compare runs, and write results.json, tables.md, differences.png and held_out.png.

    Args:
        study: Of which they are: the order of the arms, what is drawn and tested.
        results: As results.json holds them, without what is compared; numbers that are not there are nan.

    Returns:
        The tables, in Markdown. Errors are those of [`summarise`].
    """
    runs = {arm: results["arms"].get(arm, {}).get("runs", {}) for arm in study.arms}
    control = next(iter(study.arms))
    if not runs[control]:
        raise ValueError(f"No run of {control}, with which all others are compared, is finished in {root}.")
    seen = {name for seeds in runs.values() for metrics in seeds.values() for name in metrics}
    if unknown := [name for name in study.endpoints if name not in seen]:
        raise ValueError(f"endpoints: no run has '{unknown[0]}', only {', '.join(sorted(seen))}.")
    finished = {arm: seeds for arm, seeds in runs.items() if seeds}
    compared, tested = compare(finished), compare_endpoints(runs, study.endpoints)
    root.mkdir(parents=True, exist_ok=True)
    arms = {}
    for arm in finished:
        intervals = {kind: {name: list(each) for name, each in part.items()} for kind, part in compared[arm].items()}
        of_arm = {name: each._asdict() for name, each in tested.get(arm, {}).items()}
        arms[arm] = results["arms"][arm] | intervals | ({"endpoints": of_arm} if of_arm else {})
    without_nan = json.loads(json.dumps(results | {"arms": arms}), parse_constant=lambda _: None)
    (root / "results.json").write_text(json.dumps(without_nan, indent=1) + "\n")
    parts = [table(compared, "mean"), notes(finished)]
    if any(part["minus_control"] for part in list(compared.values())[1:]):
        draw_differences(compared, study.differences or usual_differences(compared), root / "differences.png")
        parts += [f"Difference to {control}, seed by seed:", table(compared, "minus_control"), paired(finished)]
    if tested:
        parts += [
            f"Endpoints, named in advance: {', '.join(study.endpoints)}.",
            endpoint_table(compared, tested),
            f"p is that of the paired t-test over seeds. Holm's correction is over all {len(tested)} x "
            f"{len(study.endpoints)} comparisons.",
        ]
    held_out = {arm: results["arms"][arm]["curves"] for arm in finished}
    if any(curves for seeds in held_out.values() for curves in seeds.values()):
        draw_curves(held_out, root / "held_out.png")
    text = "\n\n".join(filter(None, parts))
    (root / "tables.md").write_text(text + "\n")
    return text


def merge(study: Study, paths: Sequence[Path], root: Path) -> str:
    """Take the results.json files of parts of a study together, and write what [`write_results`] does in `root`.

    Raises:
        ValueError: for a file that is no such part, one that would be written over, parts of other arguments, recipes
            or versions, and a seed of an arm in two of them; see also [`write_results`].
    """
    parts = {path: read_part(path) for path in paths}
    (first_path, first), *_ = parts.items()
    merged: dict = {name: first[name] for name in SAME} | {"arms": {}}
    came_from: dict[tuple[str, int], Path] = {}
    if root / "results.json" in paths:
        raise ValueError(f"{root / 'results.json'} is a part, and would be written over. Give another --output_dir.")
    for path, part in parts.items():
        for name in SAME:
            if part[name] != first[name]:
                raise ValueError(f"{path} has {name} {part[name]}, but {first_path} has {first[name]}.")
        for arm, there in part["arms"].items():
            if arm not in study.arms:
                raise ValueError(f"{path}: the study has no arm '{arm}', only {', '.join(study.arms)}.")
            same = {name: there[name] for name in ("train", "recipe_sha256")}
            into = merged["arms"].setdefault(arm, {**same, "runs": {}, "curves": {}})
            for name, value in same.items():
                if value != into[name]:
                    raise ValueError(f"{path}: {name} of '{arm}' is {value}, but {into[name]} in a part before it.")
            for seed in there["runs"]:
                if seed in into["runs"]:
                    raise ValueError(f"Seed {seed} of the arm '{arm}' is in {came_from[arm, seed]} and in {path}.")
                came_from[arm, seed] = path
                into["runs"][seed] = there["runs"][seed]
                into["curves"][seed] = there["curves"][seed]
    return write_results(study, merged, root)


def read_part(path: Path) -> dict:
    """What a results.json holds, with seeds and updates as numbers, and nan for what is null.

    Raises:
        ValueError: if it is none, or an older one.
    """
    try:
        part = json.loads(path.read_text())
        for arm in part["arms"].values():
            arm["runs"] = {
                int(seed): {name: math.nan if value is None else value for name, value in metrics.items()}
                for seed, metrics in arm["runs"].items()
            }
            arm["curves"] = {
                int(seed): {name: {int(at): value for at, value in curve.items()} for name, curve in curves.items()}
                for seed, curves in arm["curves"].items()
            }
        missing = [name for name in SAME if name not in part]
        missing += [name for arm in part["arms"].values() for name in ("train", "recipe_sha256") if name not in arm]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the results.json of a study, or one of an older version: {error}.") from error
    if missing:
        raise ValueError(f"{path} cannot be merged: it does not say {missing[0]}.")
    return part


def usual_differences(compared: dict[str, dict]) -> list[str]:
    """Accuracy on each set of problems, or else the reward; length and gradient norm."""
    names = dict.fromkeys(name for part in list(compared.values())[1:] for name in part["minus_control"])
    accuracies = [name for name in names if "avg@" in name and "auc_avg@" not in name] or ["reward"]
    return [name for name in [*accuracies, "mean_length", "grad_norm"] if name in names]


def notes(runs: dict[str, dict[int, dict[str, float]]]) -> str:
    """What the numbers of the first table are."""
    counts = {arm: len(seeds) for arm, seeds in runs.items()}
    same = len(set(counts.values())) == 1
    of_each = f"{next(iter(counts.values()))}" if same else ", ".join(f"{n} of {arm}" for arm, n in counts.items())
    sentences = [f"Seeds: {of_each}. " + what_is_shown(list(counts.values()), "Cells are means over the seeds")]
    updates = sorted({int(metrics["updates"]) for seeds in runs.values() for metrics in seeds.values()})
    if len(updates) > 1:
        sentences.append(f"The runs have {updates[0]} to {updates[-1]} updates: do not compare means over training.")
    return " ".join(sentences)


def paired(runs: dict[str, dict[int, dict[str, float]]]) -> str:
    """What the numbers of the second table are."""
    control, *arms = runs
    shared = {arm: len(runs[arm].keys() & runs[control].keys()) for arm in arms}
    sentences = [what_is_shown([count for count in shared.values() if count], "Cells are means of the differences")]
    sentences += [f"{arm} shares no seed with {control}." for arm, count in shared.items() if not count]
    return " ".join(sentences)


def what_is_shown(counts: list[int], cells: str) -> str:
    few = f"of fewer than {MIN_SEEDS} seeds an interval says nothing, so there is none"
    if min(counts) >= MIN_SEEDS:
        return f"{cells}, with 95% intervals."
    if max(counts) >= MIN_SEEDS:
        return f"{cells}, with 95% intervals; {few}."
    return f"{cells}, without intervals: {few}. Each run's numbers are in results.json."
