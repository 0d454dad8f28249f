"""Does Future-KL point at the tokens that matter? Rank correlations of what a token got with its true credit.

Two things may be meant, and each has a column of its own:

    credit        what the token did to the chance of success: Spearman's rho of a signal with it
    size          how much it did, up or down: Spearman's rho with the product of the credit by two halves of the
                  samples. Its mean is the square of the true credit, without the noise that |credit| would add

Within answers, rho is that of the tokens of one answer, averaged over answers; answers in which either side is the
same everywhere have none. Pooled, it is that of the tokens of all answers. Intervals are 95%, by bootstrap over
answers: tokens of one answer are no independent samples.

The credit itself is an estimate. `ceiling` is what a signal that knew the true credit could reach: the root of the
reliability 2 r / (1 + r), where r is rho between the credit by two halves of the samples (Spearman and Brown).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from fipo_trl.analysis.report import COLOURS
from fipo_trl.analysis.true_credit import HALF_LIVES, Answer
from fipo_trl.evaluation.statistics import Interval


RESAMPLES = 1000
MIN_TOKENS = 4  # of an answer that has a correlation of its own
MIN_ANSWERS = 3  # whose correlations have an interval: one answer, resampled, is always itself
# What might tell a token's credit, and its title. The log-ratio alone is Future-KL without a future. F is a sum over
# the tokens that follow, so it changes with the position, which alone may tell the credit where answers share a form
SIGNALS = {
    "future_kl": "Future-KL F",
    "weight": "weight f",
    **{f"future_kl_{half_life}": f"F, half-life {half_life}" for half_life in HALF_LIVES},
    "log_ratio": "log-ratio d",
    "abs_log_ratio": "size of d",
    "entropy": "entropy",
    "position": "position",
    "shuffled_future_kl": "F, shuffled",
}
TARGETS = ("credit", "size")
GROUPS: dict[str, Callable[[Answer], bool]] = {
    "all": lambda answer: True,
    "right": lambda answer: answer.advantage > 0,
    "wrong": lambda answer: answer.advantage < 0,
}
WHOLE = "all steps"  # the part that holds all traces


class Ranks:
    """Mid-ranks of some values, each of which may count several times."""

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of equal values
        self.counts = np.diff(np.r_[self.starts, len(values)])

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The rank (N,) of each value, up to a constant, where it is there `weights` (N,) times."""
        of_group = np.add.reduceat(weights[self.order], self.starts)
        ranks = np.empty(len(weights))
        ranks[self.order] = np.repeat(np.cumsum(of_group) - of_group / 2, self.counts)
        return ranks


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's, of values that are there `weights` times; nan where either is the same everywhere."""
    total = weights.sum()
    if not total:
        return math.nan
    x, y = x - weights @ x / total, y - weights @ y / total
    scale = math.sqrt((weights @ x**2) * (weights @ y**2))
    return float(weights @ (x * y) / scale) if scale > 1e-12 * total else math.nan


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho of two arrays (N,), ties at their mean rank; nan where either is the same everywhere."""
    once = np.ones(len(x))
    return correlation(Ranks(x)(once), Ranks(y)(once), once)


class Pair(NamedTuple):
    """A correlation within answers, and of their tokens pooled."""

    within: Interval
    pooled: Interval


def columns_of(answer: Answer) -> dict[str, np.ndarray]:
    """All that is correlated, (N,) each: signals, targets, and the halves of the credit."""
    first, second = answer.halves
    return {
        **answer.signals,
        "abs_log_ratio": np.abs(answer.signals["log_ratio"]),
        "position": answer.positions.astype(np.float64),
        "credit": answer.credit,
        "size": first * second,
        "first half": first,
        "second half": second,
    }


def correlations(answers: Sequence[Answer], pairs: Sequence[tuple[str, str]], seed: int = 0) -> list[Pair]:
    """Rank correlations of pairs of [`columns_of`] some answers, with intervals; all see the same resamples.

    What cannot be told, such as the correlation with something that is the same everywhere, is nan. So are the ends of
    an interval over fewer than `MIN_ANSWERS`.
    """
    nothing = Pair(*[Interval(math.nan, math.nan, math.nan)] * 2)
    if not answers:
        return [nothing] * len(pairs)
    columns = [columns_of(answer) for answer in answers]
    counts = np.array([len(answer.positions) for answer in answers])
    enough = counts >= MIN_TOKENS
    within = np.array(
        [
            [rank_correlation(of[x], of[y]) if there else math.nan for of, there in zip(columns, enough, strict=True)]
            for x, y in pairs
        ]
    )  # (pairs, answers)
    told = ~np.isnan(within)
    names = sorted({name for pair in pairs for name in pair})
    ranks = {name: Ranks(np.concatenate([of[name] for of in columns])) for name in names}
    generator = np.random.default_rng(seed)
    equal = np.full(len(answers), 1 / len(answers))
    values = []
    for resample in range(RESAMPLES + 1):  # the first is what is there
        times = generator.multinomial(len(answers), equal) if resample else np.ones(len(answers), dtype=int)
        of_tokens = np.repeat(times, counts).astype(np.float64)
        ranked = {name: of(of_tokens) for name, of in ranks.items()}
        mean = np.where(told, within, 0.0) @ times / np.where(told @ times == 0, math.nan, told @ times)
        values.append([mean, [correlation(ranked[x], ranked[y], of_tokens) for x, y in pairs]])
    table = np.array(values)  # (resamples + 1, 2, pairs)
    with np.errstate(all="ignore"):
        low, high = (quantile(table[1:], q) for q in (0.025, 0.975))
    answers_of = np.stack([told.sum(axis=1), np.full(len(pairs), len(answers))])  # (2, pairs)
    low[answers_of < MIN_ANSWERS] = high[answers_of < MIN_ANSWERS] = math.nan
    return [
        Pair(*(Interval(float(table[0, kind, i]), float(low[kind, i]), float(high[kind, i])) for kind in (0, 1)))
        for i in range(len(pairs))
    ]


def quantile(table: np.ndarray, q: float) -> np.ndarray:
    """Over the first axis, of what is a number; nan where nothing is."""
    flat = table.reshape(len(table), -1)
    ends = [np.quantile(told, q) if len(told := column[~np.isnan(column)]) else math.nan for column in flat.T]
    return np.array(ends).reshape(table.shape[1:])


def ceiling(between_halves: float) -> float:
    """What the correlation with the estimated credit is of one who knows the true credit; nan if it is all noise.

    Args:
        between_halves: rho of the credit by one half of the samples with that by the other.
    """
    return math.sqrt(2 * between_halves / (1 + between_halves)) if between_halves > 0 else math.nan


def fidelity(answers: Sequence[Answer]) -> dict:
    """All numbers of some answers, as JSON: `{group: {"correlations": {signal: {target: ...}}, ...}}`."""
    result = {}
    for group, belongs in GROUPS.items():
        members = [answer for answer in answers if belongs(answer)]
        pairs = [(signal, target) for signal in SIGNALS for target in TARGETS]
        *found, halves = correlations(members, [*pairs, ("first half", "second half")])
        credit = np.concatenate([answer.credit for answer in members]) if members else np.array([])
        error = np.concatenate([answer.error for answer in members]) if members else np.array([])
        tables: dict[str, dict[str, dict]] = {signal: {} for signal in SIGNALS}
        for (signal, target), pair in zip(pairs, found, strict=True):
            tables[signal][target] = {kind: list(interval) for kind, interval in pair._asdict().items()}
        result[group] = {
            "answers": len(members),
            "tokens": len(credit),
            "mean_abs_credit": float(np.abs(credit).mean()) if len(credit) else math.nan,
            "mean_error": float(error.mean()) if len(error) else math.nan,
            "beyond_two_errors": float((np.abs(credit) > 2 * error).mean()) if len(credit) else math.nan,
            "ceiling": {kind: ceiling(interval.value) for kind, interval in halves._asdict().items()},
            "correlations": tables,
        }
    return result


def parts_of(answers: Sequence[Answer], parts: int) -> dict[str, list[Answer]]:
    """Answers of consecutive traces together, in so many parts of training with about as many answers each; and all.

    Late in a run few answers have an advantage, so late parts are longer.
    """
    steps, counts = np.unique([answer.step for answer in answers], return_counts=True)
    middle = (np.cumsum(counts) - counts / 2) / counts.sum()  # of each trace, as a share of the answers before it
    part_of = (middle * parts).astype(int)
    result = {}
    for part in np.unique(part_of):
        first, last = steps[part_of == part][[0, -1]].tolist()
        name = f"step {first}" if first == last else f"steps {first} to {last}"
        result[name] = [answer for answer in answers if first <= answer.step <= last]
    return result | ({WHOLE: list(answers)} if len(result) > 1 else {})


def cell(values: Sequence[float]) -> str:
    value, low, high = values
    if math.isnan(value):
        return "-"
    return f"{value:+.2f}" if math.isnan(low) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def tables(results: dict[str, dict], target: str) -> str:
    """Markdown: for each part, signals down; within answers and pooled, each for right and wrong answers, across."""
    titles = [f"{kind}, {group}" for kind in ("within", "pooled") for group in ("right", "wrong")]
    lines = []
    for part, groups in results.items():
        lines += [f"| {part}: {target} | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for signal, title in SIGNALS.items():
            cells = [
                cell(groups[group]["correlations"][signal][target][kind])
                for kind in ("within", "pooled")
                for group in ("right", "wrong")
            ]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        if target == "credit":
            most = [groups[group]["ceiling"][kind] for kind in ("within", "pooled") for group in ("right", "wrong")]
            lines.append("| ceiling | " + " | ".join("-" if math.isnan(x) else f"{x:.2f}" for x in most) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def noise(results: dict[str, dict]) -> str:
    """Markdown: how much credit there is, and how well it is known."""
    lines = [
        "| part | answers | tokens | mean of credit's size | its standard error | beyond two errors |",
        "|---" * 6 + "|",
    ]
    for part, groups in results.items():
        for group in ("right", "wrong"):
            each = groups[group]
            cells = [f"{each['mean_abs_credit']:.3f}", f"{each['mean_error']:.3f}", f"{each['beyond_two_errors']:.0%}"]
            told = cells if each["tokens"] else ["-"] * len(cells)
            lines.append(f"| {part}, {group} | {each['answers']} | {each['tokens']} | {' | '.join(told)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict], path: Path):
    """Within answers: each signal with credit and with its size, of all steps; and F over training."""
    whole = results[WHOLE] if WHOLE in results else next(iter(results.values()))
    parts = [part for part in results if part != WHOLE]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, target in zip(axes[:2], TARGETS, strict=True):
        for offset, (group, color) in zip((-0.13, 0.13), (("right", COLOURS[0]), ("wrong", COLOURS[1])), strict=True):
            for place, signal in enumerate(SIGNALS):
                value, low, high = whole[group]["correlations"][signal][target]["within"]
                axis.plot([low, high], [place + offset] * 2, color=color, linewidth=1.5)
                axis.plot(value, place + offset, "o", color=color, markersize=4, label=None if place else group)
        axis.axvline(0, color="#888", linewidth=1)
        axis.set_yticks(range(len(SIGNALS)), list(SIGNALS.values()))
        axis.invert_yaxis()
        axis.set_title({"credit": "with true credit", "size": "with its size"}[target], fontsize=10)
        axis.set_xlabel("rank correlation within answers", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    for shift, (group, color) in zip((-0.04, 0.04), (("right", COLOURS[0]), ("wrong", COLOURS[1])), strict=True):
        places = [place + shift for place in range(len(parts))]
        ends = [results[part][group]["correlations"]["future_kl"]["credit"]["within"] for part in parts]
        most = [results[part][group]["ceiling"]["within"] for part in parts]
        axes[2].plot(places, [value for value, _, _ in ends], "o-", color=color, markersize=4)
        axes[2].vlines(places, [low for _, low, _ in ends], [high for _, _, high in ends], color=color)
        axes[2].plot(places, most, color=color, linestyle=":", linewidth=1)
    axes[2].axhline(0, color="#888", linewidth=1)
    axes[2].set_xticks(range(len(parts)), [part.replace(" to ", "\nto ") for part in parts], fontsize=7)
    axes[2].set_title("F with true credit (dotted: ceiling)", fontsize=10)
    axes[2].margins(x=0.15)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
