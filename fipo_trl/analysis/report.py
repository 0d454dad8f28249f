"""What runs did, side by side: the paper's figures 3, 4, 5 and 9 as PNG files and one HTML page.

All of it comes from `trainer_state.json`, which transformers writes into every checkpoint. So it works for a run of
any trainer; what a run did not log is left out, and said. Runs of one arm, such as seeds, become a mean and a band.
"""

import base64
import html
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from io import BytesIO
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fipo_trl.analysis.collapse import HISTORY, PATIENCE, Collapse, collapse_at
from fipo_trl.trainer.metrics import BEHAVIOURS
from fipo_trl.trainer.resume import TRAINER_STATE_NAME, latest_state


@dataclass(frozen=True)
class Panels:
    """One figure: a title, a sentence, and its panels from left to right, `{metric: title}`."""

    title: str
    meaning: str
    panels: dict[str, str]


FIGURES = {
    "length": Panels(
        "Length of the answers (figure 3 of the paper)",
        "Tokens of the completions of a generation. In the paper all five rise with FIPO and stall with DAPO.",
        {
            "completions/min_length": "shortest",
            "completions/q25_length": "first quartile",
            "completions/mean_length": "mean",
            "completions/median_length": "median",
            "completions/q75_length": "third quartile",
        },
    ),
    "reward": Panels(
        "Reward (figure 4)",
        "The mean reward, the rounds of dynamic sampling that filled a batch, and the sum of length times advantage "
        "over that of length: above 0 where long answers do better than short ones.",
        {
            "reward": "reward",
            "dynamic_sampling/rounds": "generation rounds",
            "completions/length_weighted_advantage": "length-weighted advantage",
        },
    ),
    "stability": Panels(
        "Stability (figure 5)",
        "How far updates move the policy from the one that generated, and how sure of itself it is.",
        {"policy/kl": "policy KL, nats", "grad_norm": "gradient norm", "entropy": "entropy, nats"},
    ),
    "influence": Panels(
        "Influence weights and clipping (figures 9 and 11)",
        "The mean influence weight, and the shares of tokens: with a weight at a bound, dual-clipped, clipped.",
        {
            "fipo/influence_weight/mean": "influence weight",
            "fipo/influence_weight/low_clip_fraction": "weights at the lower bound",
            "fipo/influence_weight/high_clip_fraction": "weights at the upper bound",
            "policy/dual_clip_fraction": "dual-clipped tokens",
            "clip_ratio/region_mean": "clipped tokens",
        },
    ),
    "behaviour": Panels(
        "What the answers do (section 5 of the paper)",
        "Shares of the answers, by patterns in their text: derivation_pattern and self_check_pattern.",
        {f"behaviour/{name}": name.replace("_", " ").replace("self ", "self-") for name in BEHAVIOURS},
    ),
    "collapse": Panels(
        "A collapse",
        "The paper's signature, in its order. Dotted: where the alarm fires.",
        {
            "policy/dual_clip_fraction": "dual-clipped tokens",
            "policy/kl": "policy KL, nats",
            "grad_norm": "gradient norm",
            "completions/mean_length": "mean length, tokens",
        },
    ),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
CLOCKS = {"rollout_iteration": "rollout iteration", "step": "optimizer update"}
LAST = 0.1  # of the rows of a run: what the table calls its end


class Run:
    """The rows that a run logged in training.

    Raises:
        ValueError: if there is no `trainer_state.json` in the folder or its checkpoints, or nothing was logged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = [file for file in (folder / TRAINER_STATE_NAME, latest_state(folder)) if file]
        try:
            states = [json.loads(file.read_text()) for file in files if file.is_file()]
        except ValueError as error:
            raise ValueError(f"{TRAINER_STATE_NAME} of {folder} is not what transformers writes: {error}") from error
        if not states:
            raise ValueError(
                f"{folder} has no {TRAINER_STATE_NAME}, nor has a checkpoint in it. Give the output_dir of a run that "
                "saved a checkpoint."
            )
        self.history = max(states, key=lambda state: state["global_step"])["log_history"]
        self.rows = [row for row in self.history if "loss" in row]
        if not self.rows:
            raise ValueError(f"{folder} logged nothing in training. Set logging_steps below the number of updates.")

    def series(self, metric: str, clock: str) -> dict[float, float]:
        """The metric by the clock; the mean where several rows share a tick."""
        values = defaultdict(list)
        for row in self.rows:
            if row.get(metric) is not None:
                values[row[clock]].append(row[metric])
        return {tick: mean(values[tick]) for tick in sorted(values)}

    def has(self, metric: str) -> bool:
        return any(row.get(metric) is not None for row in self.rows)

    def end(self, metric: str) -> float | None:
        """The mean of the metric over the last tenth of its rows."""
        values = [row[metric] for row in self.rows if row.get(metric) is not None]
        return mean(values[-max(1, round(LAST * len(values))) :]) if values else None

    @cached_property
    def collapse(self) -> Collapse | None:
        """The first alarm of this run, whether or not someone listened."""
        windows = (self.rows[max(0, end - PATIENCE - HISTORY) : end] for end in range(1, len(self.rows) + 1))
        return next(filter(None, map(collapse_at, windows)), None)


def find_arms(arguments: list[str]) -> dict[str, list[Run]]:
    """The runs that the arguments name, by arm.

    Args:
        arguments: Each a run's folder, which is an arm of its own; a folder of runs, which are seeds of one arm; or
            `NAME=PATTERN`, the runs that match a pattern such as `outputs/fipo-*`.

    Raises:
        ValueError: if an argument names no run, or two name the same arm.
    """
    arms = {}
    for argument in arguments:
        name, equals, pattern = argument.rpartition("=")
        folders = sorted(Path(path) for path in glob(pattern)) if equals else [Path(argument)]
        name = name if equals else folders[0].resolve().name
        if not folders or not all(folder.exists() for folder in folders):
            raise ValueError(f"'{argument}' names nothing that exists. Give a run's folder, or NAME=PATTERN.")
        if not name or name in arms:
            raise ValueError(f"'{argument}': a second arm, or one without a name. Write it as NAME={pattern}.")
        if not equals and not is_run(folders[0]):
            folders = sorted(folder for folder in folders[0].iterdir() if is_run(folder)) or folders
        arms[name] = [Run(folder) for folder in folders if not equals or folder.is_dir()]
    return arms


def is_run(folder: Path) -> bool:
    return (folder / TRAINER_STATE_NAME).is_file() or latest_state(folder) is not None


def draw(panels: dict[str, str], arms: dict[str, list[Run]], clock: str) -> bytes:
    """A PNG image: one panel per metric, one colour per arm, the mean over its runs, and their range as a band."""
    figure = Figure(figsize=(3.1 * len(panels), 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for number, runs in enumerate(arms.values()):
            color = COLOURS[number % len(COLOURS)]
            ticks = defaultdict(list)
            for run in runs:
                for tick, value in run.series(metric, clock).items():
                    ticks[tick].append(value)
            x, columns = sorted(ticks), [ticks[tick] for tick in sorted(ticks)]
            marker = "." if len(x) == 1 else None  # a line of one point is not seen
            axis.plot(x, [mean(column) for column in columns], color=color, linewidth=1.3, marker=marker)
            if len(runs) > 1:
                band = [min(column) for column in columns], [max(column) for column in columns]
                axis.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
            for run in runs:
                if alarm := run.collapse:
                    tick = next(row[clock] for row in run.rows if row["step"] == alarm.update)
                    axis.axvline(tick, color=color, linewidth=1, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(CLOCKS[clock], fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    lines = [axes[0].plot([], [], color=COLOURS[i % len(COLOURS)])[0] for i in range(len(arms))]
    figure.legend(lines, list(arms), loc="outside right upper", fontsize=9, frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def write_report(arms: dict[str, list[Run]], output_dir: Path) -> list[str]:
    """Write a PNG file per figure, and `report.html`, which holds them all and needs no other file or network.

    The figure of a collapse is drawn only where the alarm fired.

    Returns:
        What is missing, a sentence each: metrics that an arm did not log, figures that were left out.
    """
    runs = [run for arm in arms.values() for run in arm]
    clock = next(name for name in CLOCKS if all(row.get(name) is not None for run in runs for row in run.rows))
    output_dir.mkdir(parents=True, exist_ok=True)
    sections, missing = [], []
    for name, figure in FIGURES.items():
        if name == "collapse" and not any(run.collapse for run in runs):
            continue
        panels = {metric: title for metric, title in figure.panels.items() if any(run.has(metric) for run in runs)}
        for arm, members in arms.items():
            if absent := [metric for metric in figure.panels if not any(run.has(metric) for run in members)]:
                missing.append(f"{arm} did not log {', '.join(absent)}.")
        if not panels:
            continue
        image = draw(panels, arms, clock)
        (output_dir / f"{name}.png").write_bytes(image)
        sections.append(
            f"<h2>{html.escape(figure.title)}</h2>\n<p>{html.escape(figure.meaning)}</p>\n"
            f'<div class="figure"><img alt="{html.escape(", ".join(panels.values()))}" width="{248 * len(panels)}" '
            f'src="data:image/png;base64,{base64.b64encode(image).decode()}"></div>'
        )
    missing = list(dict.fromkeys(missing))
    (output_dir / "report.html").write_text(page(arms, sections, missing), encoding="utf-8")
    return missing


def page(arms: dict[str, list[Run]], sections: list[str], missing: list[str]) -> str:
    """The HTML page: a table of the runs, the figures, and what is missing."""
    columns = {"reward": "reward", "completions/mean_length": "mean length", "entropy": "entropy"}
    head = ["arm", "run", "updates", *(f"{title}, at the end" for title in columns.values()), "alarm"]
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    for number, (arm, runs) in enumerate(arms.items()):
        for run in runs:
            ends = [run.end(metric) for metric in columns]
            cells = [arm, str(run.folder), str(run.rows[-1]["step"])]
            cells += ["-" if end is None else f"{end:.4g}" for end in ends]
            cells.append(f"update {run.collapse.update}: {run.collapse}" if run.collapse else "-")
            style = f' style="border-left: 6px solid {COLOURS[number % len(COLOURS)]}"'
            lines.append(f"<tr{style}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    notes = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in missing)
    figures, table = "\n".join(sections), "\n".join(lines)
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Run report: {html.escape(", ".join(arms))}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }}
.figure, .runs {{ overflow-x: auto }} /* panels keep their size on a narrow page, and are scrolled */
table {{ border-collapse: collapse; font-size: 13px }}
th, td {{ text-align: left; padding: 3px 12px; border-bottom: 1px solid #ddd; vertical-align: top }}
</style>
<h1>Run report</h1>
<p>Lines are means over the runs of an arm, bands their range. "At the end" is the mean over the last tenth.</p>
<div class="runs"><table>
{table}
</table></div>
{figures}
<h2>Left out</h2>
<ul>
{notes or "<li>Nothing.</li>"}
</ul>
</html>
"""
