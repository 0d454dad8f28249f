"""Results as text: one evaluation, or two of the same problems side by side."""

from pathlib import Path

from fipo_trl.evaluation.results import read_pair
from fipo_trl.evaluation.statistics import paired_bootstrap


def rows_of_table(n: int) -> dict[str, str]:
    """The metrics of a table and the form of their numbers."""
    ks = [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n] * (n > 1)
    rates = [f"avg@{n}", f"cons@{n}", *(f"pass@{k}" for k in ks), "truncated"]
    return dict.fromkeys(rates, "{:.1%}") | {"mean_length": "{:.1f}"}


def table(name: str, summary: dict, beside: dict[str, dict[str, float]], note: str | None = None) -> str:
    """The summary of an evaluation as text.

    Args:
        name: Of the problems.
        summary: As [`fipo_trl.evaluation.results.write_results`] returns it.
        beside: `{heading: {metric: percent}}`, columns of published numbers.
        note: Of these numbers, in a line of its own.
    """
    settings = summary["settings"]
    lines = [
        f"\n{name}: {settings['problems']} problems x {settings['n']} samples, temperature {settings['temperature']}, "
        f"top-p {settings['top_p']}, at most {settings['max_tokens']} tokens ({settings['backend']})\n",
        f"{'':14}{'':>9}  {'95% interval':18}" + "".join(f"{heading:>13}" for heading in beside),
    ]
    for metric, form in rows_of_table(settings["n"]).items():
        if metric in summary["metrics"]:
            value, low, high = map(form.format, summary["metrics"][metric].values())
            theirs = [f"{numbers[metric]}%" if metric in numbers else "" for numbers in beside.values()]
            lines.append(f"{metric:14}{value:>9}  {f'[{low}, {high}]':18}" + "".join(f"{text:>13}" for text in theirs))
    lines.append(f"{'  quartiles':14}{', '.join(f'{length:g}' for length in summary['length_quartiles']):>9} tokens")
    if not settings["has_answers"]:
        lines.append("No cons@n: there is no predicted_answer(completion) in the module of the reward function.")
    if note:
        lines.append(note)
    return "\n".join(lines)


def compare(a: Path, b: Path) -> str:
    """The paired differences of two evaluations of the same problems, as text. Errors are those of [`read_pair`]."""
    (of_a, metrics_a), (of_b, metrics_b) = read_pair(a, b)
    different = [f"{name} ({of_a[name]}, {of_b.get(name)})" for name in of_a if of_a[name] != of_b.get(name)]
    lines = [
        f"\nA: {a}\nB: {b}\n{of_a['problems']} problems x {of_a['n']} samples. "
        f"Different: {', '.join(different) or 'nothing'}\n",
        f"{'':14}{'A':>9}{'B':>9}{'B - A':>9}  95% interval, paired",
    ]
    differences = paired_bootstrap(metrics_a, metrics_b)
    for metric, form in rows_of_table(of_a["n"]).items():
        if metric in differences:
            ours, theirs = (form.format(each[metric].mean()) for each in (metrics_a, metrics_b))
            value, low, high = map(form.format, differences[metric])
            lines.append(f"{metric:14}{ours:>9}{theirs:>9}{value:>9}  [{low}, {high}]")
    return "\n".join(lines)
