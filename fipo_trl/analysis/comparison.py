"""Arms of a study against its control: one number per metric and run, means over the seeds, paired differences.

Runs of one seed start from the same weights, problems and random numbers, so the differences to the control are taken
seed by seed. Intervals are Student's: the seeds are few, and a bootstrap over them would be too short. Two seeds have
none: Student's would be 13 times as wide as they lie apart.

A study may name its endpoints in advance. Each is tested in each arm by the paired t-test, with Holm's correction over
all of these comparisons. The p-value of one is below 0.05 where its interval leaves out 0.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from scipy.stats import t

from fipo_trl.analysis.report import COLOURS, Run
from fipo_trl.evaluation.statistics import Interval
from fipo_trl.trainer.metrics import BEHAVIOURS, behaviour


MIN_SEEDS = 3  # for an interval
FINAL_SHARE = 0.8  # of its own final accuracy, which a run must reach for `updates_to_80`
SMOOTHED = 3  # rows (generations, if each is logged): the mean of so many must reach it
# What the runs logged, averaged over all rows
LOGGED = (
    "reward",
    "grad_norm",
    "policy/kl",
    "policy/dual_clip_fraction",
    "entropy",
    "fipo/active_fraction",
    "fipo/influence_weight/mean",
    "fipo/influence_weight/low_clip_fraction",
    "fipo/influence_weight/high_clip_fraction",
    "fipo/future_kl",
    "fipo/masked_fraction",
    "fipo/dropped_sequence_fraction",
)


def metrics_of(
    run: Run, evaluations: Sequence[Path] = (), derivation: str | None = None, self_check: str | None = None
) -> dict[str, float]:
    """All that is compared of one run; what it did not log is left out.

    Args:
        run: What it logged in training.
        evaluations: The folders, one for each set of problems, that `fipo-trl evaluate` wrote for its last weights.
        derivation, self_check: Patterns that tell what a completion does, see `fipo_trl.trainer.metrics`.

    Returns:
        On held-out problems: `avg@n`, `cons@n`, `pass@n`, `mean_length`, `length_q25`, `length_median`, `length_q75`
        (tokens), `truncated`, and with the patterns `behaviour/*` (shares of the completions); with several sets of
        problems as `aime24: avg@n`. Without evaluations, the last `avg@n` and `mean_length` that training logged of
        `eval_problems`. Of these also `auc_avg@n`, over all of training; see [`area`]. In training, means over all
        rows: `LOGGED`, and also `grad_norm/max`; `updates_to_80`; `alarms`, 1 where the signature of a collapse shows;
        `prompts_sampled` by dynamic sampling; `seconds` of sampling and updates; `updates`.
    """
    metrics: dict[str, float] = {}
    for name, curve in curves_of(run).items():
        if not evaluations:
            metrics[name] = list(curve.values())[-1]
        if "avg@" in name and len(curve) > 1:
            metrics[name.replace("avg@", "auc_avg@")] = area(curve)
    for evaluation in evaluations:
        prefix = f"{evaluation.name}: " if len(evaluations) > 1 else ""
        metrics |= {prefix + name: value for name, value in held_out(evaluation, derivation, self_check).items()}
    for name in LOGGED:
        if run.has(name):
            metrics[name] = fmean(row[name] for row in run.rows if row.get(name) is not None)
    if run.has("grad_norm"):
        metrics["grad_norm/max"] = max(row["grad_norm"] for row in run.rows if row.get("grad_norm") is not None)
    if run.has("reward"):
        metrics["updates_to_80"] = updates_to(run)
    metrics["updates"] = float(run.rows[-1]["step"])
    metrics["alarms"] = float(run.collapse is not None)
    generated = [row.get("dynamic_sampling/generated") for row in run.rows]  # per generation
    generated = [prompts for prompts in generated if prompts is not None]
    if generated and run.has("rollout_iteration"):
        metrics["prompts_sampled"] = fmean(generated) * run.rows[-1]["rollout_iteration"]
    if run.has("step_time"):
        times = [row["step_time"] for row in run.rows if row.get("step_time") is not None]
        metrics["seconds"] = fmean(times) * run.rows[-1]["step"]
    return metrics


def curves_of(run: Run) -> dict[str, dict[int, float]]:
    """What training logged of `eval_problems`, by update, to 5 decimals: `avg@n` and `mean_length`, with several sets
    of problems as `aime24: avg@n`."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in run.history:
        for name, value in row.items():
            if found := re.fullmatch(r"eval_(.+)/(avg@\d+|mean_length)", name):
                curves.setdefault((found[1], found[2]), {})[row["step"]] = round(value, 5)
    several = len({problems for problems, _ in curves}) > 1
    return {f"{problems}: {name}" if several else name: curve for (problems, name), curve in curves.items()}


def area(curve: dict[int, float]) -> float:
    """The area under a curve, by trapezoids, divided by its span: the mean of the metric over the updates.

    Args:
        curve: Values by update, at two updates or more.
    """
    updates = sorted(curve)
    parts = [(b - a) * (curve[a] + curve[b]) / 2 for a, b in pairwise(updates)]
    return sum(parts) / (updates[-1] - updates[0])


def held_out(evaluation: Path, derivation: str | None, self_check: str | None) -> dict[str, float]:
    """The metrics of one set of problems; see [`metrics_of`]."""
    summary = json.loads((evaluation / "summary.json").read_text())
    n = summary["settings"]["n"]
    wanted = [f"avg@{n}", f"cons@{n}", f"pass@{n}", "mean_length", "truncated"]
    metrics = {name: summary["metrics"][name]["value"] for name in wanted if name in summary["metrics"]}
    metrics |= zip(("length_q25", "length_median", "length_q75"), summary["length_quartiles"], strict=True)
    if derivation is not None and self_check is not None:
        texts = pq.read_table(evaluation / "completions.parquet", columns=["completion"])["completion"].to_pylist()
        seen = [behaviour(text, derivation, self_check) for text in texts]
        metrics |= {f"behaviour/{name}": seen.count(place) / len(seen) for place, name in enumerate(BEHAVIOURS)}
    return metrics


def updates_to(run: Run) -> float:
    """Updates after which the mean reward of `SMOOTHED` rows first is `FINAL_SHARE` of that of the last tenth."""
    rows = [row for row in run.rows if "reward" in row]
    final = run.end("reward")
    if final is None:
        return math.nan
    for end in range(SMOOTHED, len(rows) + 1):
        if fmean(row["reward"] for row in rows[end - SMOOTHED : end]) >= FINAL_SHARE * final:
            return float(rows[end - 1]["step"])
    return math.nan


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over seeds and its 95% interval, Student's t. With fewer than `MIN_SEEDS` its ends are nan, and where
    a value is nan, all is."""
    mean = fmean(values)
    if len(values) < MIN_SEEDS or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    half = t.ppf(0.975, len(values) - 1).item() * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def compare(runs: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict]:
    """Means over the seeds, and differences to the control.

    Args:
        runs: `{arm: {seed: metrics}}`. The first arm is the control.

    Returns:
        `{arm: {"mean": {metric: Interval}, "minus_control": {metric: Interval}}}`. Differences are those of the seeds
        that an arm shares with the control. Metrics are those that all the runs in question have.
    """
    control = next(iter(runs.values()))
    result = {}
    for arm, seeds in runs.items():
        names = [name for name in next(iter(seeds.values())) if all(name in metrics for metrics in seeds.values())]
        paired = {name: differences(seeds, control, name) for name in names}
        result[arm] = {
            "mean": {name: over_seeds([metrics[name] for metrics in seeds.values()]) for name in names},
            "minus_control": {name: over_seeds(values) for name, values in paired.items() if values},
        }
    return result


def differences(seeds: dict[int, dict[str, float]], control: dict[int, dict[str, float]], name: str) -> list[float]:
    """A metric of an arm minus that of the control, for the seeds that they share; none unless all these have it."""
    shared = sorted(seeds.keys() & control.keys())
    if not all(name in metrics[seed] for metrics in (seeds, control) for seed in shared):
        return []
    return [seeds[seed][name] - control[seed][name] for seed in shared]


class Comparison(NamedTuple):
    """An endpoint of an arm against the control.

    Attributes:
        seeds: How many pairs there are.
        p: Of the paired t-test, two-sided; nan with fewer than `MIN_SEEDS` pairs.
        p_holm: Corrected.
    """

    seeds: int
    p: float
    p_holm: float


def compare_endpoints(
    runs: dict[str, dict[int, dict[str, float]]], endpoints: Sequence[str]
) -> dict[str, dict[str, Comparison]]:
    """Test the endpoints of all arms but the control, together.

    Args:
        runs: Of [`compare`]; an arm of which nothing is finished has no seeds.
        endpoints: Metrics, named in advance.

    Returns:
        `{arm: {endpoint: Comparison}}`. A comparison that cannot be made yet counts in the correction of the others.
    """
    control = next(iter(runs.values()))
    family = [(arm, name) for arm in list(runs)[1:] for name in endpoints]
    pairs = [differences(runs[arm], control, name) for arm, name in family]
    p = [paired_t_test(values) for values in pairs]
    result: dict[str, dict[str, Comparison]] = {}
    for (arm, name), values, *of_test in zip(family, pairs, p, holm(p), strict=True):
        result.setdefault(arm, {})[name] = Comparison(len(values), *of_test)
    return result


def paired_t_test(values: Sequence[float]) -> float:
    """The two-sided p-value of differences whose mean would be 0; nan for fewer than `MIN_SEEDS`, or if one is nan."""
    if len(values) < MIN_SEEDS or math.isnan(sum(values)):
        return math.nan
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    if mean == 0.0:
        return 1.0
    return 2 * t.sf(abs(mean) / error, len(values) - 1).item() if error else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the smallest of m p-values times m, the next times m - 1, ..., none below the one before.

    Values that are nan stay so, and count as 1 for the others.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        corrected[place] = largest = max(largest, min(1.0, p * (len(p_values) - rank)))
    return corrected


# What a table shows: title, factor, decimals. n stands for any number of samples
ROWS = {
    "avg@n": ("avg@n, %", 100, 1),
    "cons@n": ("cons@n, %", 100, 1),
    "pass@n": ("pass@n, %", 100, 1),
    "auc_avg@n": ("avg@n, mean over training (area under the curve), %", 100, 1),
    "mean_length": ("mean length, tokens", 1, 1),
    "length_q25": ("first quartile", 1, 1),
    "length_median": ("median", 1, 1),
    "length_q75": ("third quartile", 1, 1),
    "behaviour/no_derivation": ("no chain, %", 100, 1),
    "behaviour/one_chain": ("one chain, %", 100, 1),
    "behaviour/one_self_check": ("one check, %", 100, 1),
    "behaviour/several_self_checks": ("several checks, %", 100, 1),
    "reward": ("reward, mean over training, %", 100, 1),
    "updates_to_80": ("updates to 80% of its final accuracy", 1, 0),
    "grad_norm": ("gradient norm, mean", 1, 3),
    "grad_norm/max": ("gradient norm, largest of a generation", 1, 2),
    "policy/kl": ("policy KL, nats / 1000", 1e3, 2),
    "entropy": ("entropy, nats", 1, 3),
    "policy/dual_clip_fraction": ("dual-clipped tokens, per million", 1e6, 1),
    "alarms": ("runs with a collapse alarm, %", 100, 0),
    "prompts_sampled": ("prompts sampled", 1, 0),
    "seconds": ("training, s", 1, 0),
    "fipo/active_fraction": ("weights other than 1, %", 100, 1),
    "fipo/influence_weight/mean": ("mean weight", 1, 4),
    "fipo/influence_weight/low_clip_fraction": ("weights at the lower bound, %", 100, 1),
    "fipo/influence_weight/high_clip_fraction": ("weights at the upper bound, %", 100, 1),
    "fipo/masked_fraction": ("masked tokens, per million", 1e6, 1),
    "fipo/dropped_sequence_fraction": ("dropped completions, per million", 1e6, 1),
}


class Row(NamedTuple):
    """How a table shows a metric: title, factor and decimals; and where, by what sorts before what."""

    title: str
    factor: float
    decimals: int
    place: tuple


def row_of(metric: str) -> Row | None:
    """The row of a metric of [`metrics_of`]; `None` if tables leave it out. Problems with a name come first."""
    problems, colon, name = metric.rpartition(": ")
    samples = re.search(r"@(\d+)$", name)
    key = name[: samples.start()] + "@n" if samples else name
    if key not in ROWS:
        return None
    title, factor, decimals = ROWS[key]
    title = problems + colon + (title.replace("@n", samples[0]) if samples else title)
    return Row(title, factor, decimals, (not problems, problems, list(ROWS).index(key)))


def table(compared: dict[str, dict], kind: str) -> str:
    """A Markdown table: metrics down, arms across, cells as `mean [low, high]`.

    Args:
        compared: Of [`compare`].
        kind: "mean" or "minus_control". The second leaves out the control, which differs from itself by nothing.
    """
    arms = list(compared)[0 if kind == "mean" else 1 :]
    lines = ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    rows = {metric: row_of(metric) for arm in arms for metric in compared[arm][kind]}
    for metric, row in sorted(((m, row) for m, row in rows.items() if row), key=lambda item: item[1].place):
        cells = [cell(compared[arm][kind].get(metric), row, signed=kind != "mean") for arm in arms]
        if any(cells):
            lines.append(f"| {row.title} | " + " | ".join(text or "-" for text in cells) + " |")
    return "\n".join(lines)


def cell(interval: Interval | None, row: Row, signed: bool) -> str:
    """A cell: the mean, and the interval if there is one."""
    if interval is None or math.isnan(interval.value):
        return ""
    form = f"{{:{'+' if signed else ''}.{row.decimals}f}}"
    value, low, high = (form.format(number * row.factor) for number in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def endpoint_table(compared: dict[str, dict], tested: dict[str, dict[str, Comparison]]) -> str:
    """A Markdown table of the endpoints: a row for each, and each arm.

    Args:
        compared: Of [`compare`].
        tested: Of [`compare_endpoints`].

    Raises:
        ValueError: for an endpoint without a title.
    """
    control = next(iter(compared))
    lines = [f"| endpoint | arm | minus {control} | seeds | p | p, Holm |", "|---" * 6 + "|"]
    for name in dict.fromkeys(name for endpoints in tested.values() for name in endpoints):
        row = titled(name)
        for arm, endpoints in tested.items():
            test = endpoints[name]
            difference = compared[arm]["minus_control"].get(name) if arm in compared else None
            cells = [row.title, arm, cell(difference, row, signed=True) or "-", str(test.seeds)]
            lines.append(f"| {' | '.join([*cells, p_value(test.p), p_value(test.p_holm)])} |")
    return "\n".join(lines)


def p_value(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def titled(metric: str) -> Row:
    """The row of a metric; a `ValueError` if it has none."""
    row = row_of(metric)
    if row is None:
        raise ValueError(f"{metric} is not in the tables, and has no title.")
    return row


def draw_differences(compared: dict[str, dict], metrics: Sequence[str], path: Path):
    """A panel per metric: the difference of each arm to the control, and its 95% interval if there is one."""
    control, *arms = compared
    figure = Figure(figsize=(3.4 * len(metrics), 0.9 + 0.35 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        row = titled(metric)
        for place, arm in enumerate(arms):
            if metric not in compared[arm]["minus_control"]:
                continue
            value, low, high = (number * row.factor for number in compared[arm]["minus_control"][metric])
            color = COLOURS[(place + 1) % len(COLOURS)]
            axis.plot([low, high], [place, place], color=color, linewidth=1.5)
            axis.plot(value, place, "o", color=color)
        axis.axvline(0, color="#888", linewidth=1)
        axis.set_title(row.title, fontsize=10)
        axis.set_xlabel(f"difference to {control}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.savefig(path, dpi=110)


def draw_curves(curves: dict[str, dict[int, dict[str, dict[int, float]]]], path: Path):
    """A panel per curve: the mean over the seeds of each arm by update, with its 95% interval if there is one.

    Args:
        curves: `{arm: {seed: curves}}`, of [`curves_of`]. An update is drawn where all seeds of the arm have it.
    """
    names = list(dict.fromkeys(name for seeds in curves.values() for curve in seeds.values() for name in curve))
    figure = Figure(figsize=(4.2 * len(names) + 1.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        row = titled(name)
        for number, (arm, seeds) in enumerate(curves.items()):
            of_arm = [curve[name] for curve in seeds.values() if name in curve]
            updates = sorted(set.intersection(*map(set, of_arm))) if of_arm else []
            means = [over_seeds([curve[update] * row.factor for curve in of_arm]) for update in updates]
            values, low, high = zip(*means, strict=True) if means else ((), (), ())
            color = COLOURS[number % len(COLOURS)]
            axis.plot(updates, values, color=color, linewidth=1.3, label=arm)
            axis.fill_between(updates, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_title(f"held-out {row.title}", fontsize=10)
        axis.set_xlabel("optimizer update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
