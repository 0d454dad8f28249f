"""Arms of a study against its control: one number per metric and run, means over the seeds, paired differences.

Runs of one seed start from the same weights, problems and random numbers, so the differences to the control are taken
seed by seed. Intervals are Student's: the seeds are few, and a bootstrap over them would be too short.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from scipy.stats import t

from fipo_trl.analysis.report import COLOURS, Run
from fipo_trl.evaluation.statistics import Interval
from fipo_trl.trainer.metrics import BEHAVIOURS, behaviour


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


def metrics_of(run: Run, evaluation: Path, derivation: str, self_check: str) -> dict[str, float]:
    """All that is compared of one run; what it did not log is left out.

    Args:
        run: What it logged in training.
        evaluation: The folder of one dataset that scripts/evaluate.py wrote for its last weights.
        derivation, self_check: Patterns that tell what a completion does, see `fipo_trl.trainer.metrics`.

    Returns:
        On held-out problems: `avg@n`, `cons@n`, `pass@n`, `mean_length`, `length_q25`, `length_median`, `length_q75`
        (tokens), `truncated`, `behaviour/*` (shares of the completions). In training, means over all rows: `LOGGED`,
        and also `grad_norm/max`; `updates_to_80`; `alarms`, 1 where the signature of a collapse shows; `seconds` of
        sampling and updates.
    """
    summary = json.loads((evaluation / "summary.json").read_text())
    n = summary["settings"]["n"]
    wanted = [f"avg@{n}", f"cons@{n}", f"pass@{n}", "mean_length", "truncated"]
    metrics = {name: summary["metrics"][name]["value"] for name in wanted if name in summary["metrics"]}
    metrics |= zip(("length_q25", "length_median", "length_q75"), summary["length_quartiles"], strict=True)
    texts = pq.read_table(evaluation / "completions.parquet", columns=["completion"])["completion"].to_pylist()
    seen = [behaviour(text, derivation, self_check) for text in texts]
    metrics |= {f"behaviour/{name}": seen.count(place) / len(seen) for place, name in enumerate(BEHAVIOURS)}
    for name in LOGGED:
        if run.has(name):
            metrics[name] = fmean(row[name] for row in run.rows if row.get(name) is not None)
    metrics["grad_norm/max"] = max(row["grad_norm"] for row in run.rows)
    metrics["updates_to_80"] = updates_to(run)
    metrics["alarms"] = float(run.collapse is not None)
    metrics["seconds"] = fmean(row["step_time"] for row in run.rows) * run.rows[-1]["step"]
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
    """The mean over seeds and its 95% interval, Student's t. With one seed there is none: its ends are nan."""
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = t.ppf(0.975, len(values) - 1).item() * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def compare(runs: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict]:
    """Means over the seeds, and differences to the control.

    Args:
        runs: `{arm: {seed: metrics}}`. The first arm is the control.

    Returns:
        `{arm: {"mean": {metric: Interval}, "minus_control": {metric: Interval}}}`. Differences are those of the seeds
        that an arm shares with the control, and of the metrics that both have.
    """
    control = next(iter(runs.values()))
    result = {}
    for arm, seeds in runs.items():
        names = list(next(iter(seeds.values())))
        shared = sorted(seeds.keys() & control.keys())
        result[arm] = {
            "mean": {name: over_seeds([metrics[name] for metrics in seeds.values()]) for name in names},
            "minus_control": {
                name: over_seeds([seeds[seed][name] - control[seed][name] for seed in shared])
                for name in names
                if shared and name in control[shared[0]]
            },
        }
    return result


# What a table shows: title, factor, decimals
ROWS = {
    "avg@32": ("avg@32, %", 100, 1),
    "cons@32": ("cons@32, %", 100, 1),
    "pass@32": ("pass@32, %", 100, 1),
    "avg@8": ("avg@8, %", 100, 1),
    "cons@8": ("cons@8, %", 100, 1),
    "pass@8": ("pass@8, %", 100, 1),
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
    "seconds": ("training, s", 1, 0),
    "fipo/active_fraction": ("weights other than 1, %", 100, 1),
    "fipo/influence_weight/mean": ("mean weight", 1, 4),
    "fipo/influence_weight/low_clip_fraction": ("weights at the lower bound, %", 100, 1),
    "fipo/influence_weight/high_clip_fraction": ("weights at the upper bound, %", 100, 1),
    "fipo/masked_fraction": ("masked tokens, per million", 1e6, 1),
    "fipo/dropped_sequence_fraction": ("dropped completions, per million", 1e6, 1),
}


def table(compared: dict[str, dict], kind: str) -> str:
    """A Markdown table: metrics down, arms across, cells as `mean [low, high]`.

    Args:
        compared: Of [`compare`].
        kind: "mean" or "minus_control". The second leaves out the control, which differs from itself by nothing.
    """
    arms = list(compared)[0 if kind == "mean" else 1 :]
    lines = ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for metric, (title, factor, decimals) in ROWS.items():
        cells = [cell(compared[arm][kind].get(metric), factor, decimals, signed=kind != "mean") for arm in arms]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(text or "-" for text in cells) + " |")
    return "\n".join(lines)


def cell(interval: Interval | None, factor: float, decimals: int, signed: bool) -> str:
    if interval is None or math.isnan(interval.value):
        return ""
    form = f"{{:{'+' if signed else ''}.{decimals}f}}"
    value, low, high = (form.format(number * factor) for number in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def draw_differences(compared: dict[str, dict], metrics: Sequence[str], path: Path):
    """A panel per metric: the difference of each arm to the control, and its 95% interval."""
    control, *arms = compared
    figure = Figure(figsize=(3.4 * len(metrics), 0.9 + 0.35 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        title, factor, _ = ROWS[metric]
        for place, arm in enumerate(arms):
            value, low, high = (number * factor for number in compared[arm]["minus_control"][metric])
            axis.plot([low, high], [place, place], color=COLOURS[place + 1], linewidth=1.5)
            axis.plot(value, place, "o", color=COLOURS[place + 1])
        axis.axvline(0, color="#888", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"difference to {control}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
