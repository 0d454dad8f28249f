import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import make_trainer
from trl import GRPOTrainer

from fipo_trl import FIPOTrainer
from fipo_trl.analysis.report import FIGURES, Run, find_arms, write_report


def write_run(folder, rows, checkpoint=None):
    """A run as transformers leaves it: its state in the newest checkpoint."""
    place = folder if checkpoint is None else folder / f"checkpoint-{checkpoint}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text(json.dumps({"global_step": rows[-1]["step"], "log_history": rows}))
    return folder


def rows_of(values, metric="reward", clock=None):
    rows = [{"loss": 0.0, "step": step, metric: value} for step, value in enumerate(values, start=1)]
    return [row if clock is None else row | {"rollout_iteration": clock(row["step"])} for row in rows]


# Reading


def test_the_newest_state_is_read(tmp_path):
    rows = rows_of([1.0, 2.0, 3.0, 4.0])
    write_run(tmp_path / "run", rows[:1], checkpoint=1)
    write_run(tmp_path / "run", rows[:3], checkpoint=10)  # after 1 in numbers, before 2 in letters
    write_run(tmp_path / "run", rows[:2], checkpoint=2)
    (tmp_path / "run" / "checkpoint-11").mkdir()  # killed while it saved: no state
    write_run(tmp_path / "run", rows[:2], checkpoint="best")  # somebody's own
    assert len(Run(tmp_path / "run").rows) == 3
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": rows}))
    assert len(Run(tmp_path / "run").rows) == 4
    assert len(Run(tmp_path / "run" / "checkpoint-2").rows) == 2


def test_series_average_rows_of_one_tick_and_skip_what_is_missing(tmp_path):
    rows = rows_of([1.0, 2.0, None, 6.0, 8.0], clock=lambda step: -(-step // 2))
    rows.insert(2, {"step": 2, "eval_reward": 9.0, "rollout_iteration": 1})  # an evaluation
    run = Run(write_run(tmp_path / "run", rows))
    assert run.series("reward", "rollout_iteration") == {1: 1.5, 2: 6.0, 3: 8.0}
    assert run.series("reward", "step") == {1: 1.0, 2: 2.0, 4: 6.0, 5: 8.0}
    assert run.series("entropy", "step") == {}
    assert (run.has("reward"), run.has("entropy"), run.end("entropy")) == (True, False, None)


@pytest.mark.parametrize("count", [1, 4, 10, 25])
def test_end_is_the_mean_of_the_last_tenth(tmp_path, count):
    values = np.random.default_rng(0).normal(size=count).tolist()
    last = max(1, round(count / 10))
    assert Run(write_run(tmp_path / "run", rows_of(values))).end("reward") == pytest.approx(np.mean(values[-last:]))


def test_arms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fipo-1", "fipo-2", "dapo/seed1", "dapo/seed2"):
        write_run(tmp_path / name, rows_of([1.0]), checkpoint=1 if "1" in name else None)
    (tmp_path / "dapo" / "notes").mkdir()
    (tmp_path / "fipo-1.log").write_text("")  # a pattern matches it too
    arms = find_arms(["F=fipo-*", "dapo", "fipo-1"])
    folders = {name: [str(run.folder) for run in runs] for name, runs in arms.items()}
    assert folders == {"F": ["fipo-1", "fipo-2"], "dapo": ["dapo/seed1", "dapo/seed2"], "fipo-1": ["fipo-1"]}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "'nowhere' names nothing that exists"),
        (["A=none-*"], "'A=none-.' names nothing that exists"),
        (["=fipo-*"], "without a name"),
        (["A=fipo-1", "A=fipo-2"], "a second arm"),
        (["fipo-1", "deep/fipo-1"], "a second arm.*Write it as NAME=deep/fipo-1"),
        (["empty"], "empty has no trainer_state.json"),
        (["silent"], "silent logged nothing in training. Set logging_steps"),
        (["broken"], "broken.*is not what transformers writes"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    for name in ("fipo-1", "fipo-2", "deep/fipo-1"):
        write_run(tmp_path / name, rows_of([1.0]))
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "silent", [{"step": 1, "train_runtime": 3.0}])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=complaint):
        find_arms(arguments)


# Drawing


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def collapsing(count, at):
    rows = rows_of([1.0] * count)
    for row in rows:
        row |= {"policy/dual_clip_fraction": 0.0, "policy/kl": 0.001, "grad_norm": 0.1, "entropy": 0.5}
    if at:
        rows[at - 1] |= {"policy/dual_clip_fraction": 0.01, "policy/kl": 1.0, "grad_norm": 1.0}
    return rows


def test_alarm_of_a_finished_run(tmp_path):
    assert Run(write_run(tmp_path / "a", collapsing(300, at=250))).collapse.update == 250
    assert Run(write_run(tmp_path / "b", collapsing(300, at=None))).collapse is None
    rows = collapsing(300, at=250)
    for row in rows[:235]:
        row["grad_norm"] = 1.0  # what has long been usual does not spike
    assert Run(write_run(tmp_path / "c", rows)).collapse is None


@pytest.mark.slow
def test_report_of_real_runs(tmp_path):
    """A FIPO run of this package beside a run of plain TRL, which lacks most metrics."""
    for name, trainer_class, seed in [
        ("fipo/1", FIPOTrainer, 1),
        ("fipo/2", FIPOTrainer, 2),
        ("grpo", GRPOTrainer, 1),
    ]:
        settings = {"max_steps": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 4}
        make_trainer(tmp_path / name, trainer_class, seed=seed, **settings).train()
    command = [sys.executable, "scripts/report.py", str(tmp_path / "fipo"), f"<b>TRL</b>={tmp_path / 'grpo'}"]
    run = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "Left out: <b>TRL</b> did not log completions/q25_length, completions/median_length" in run.stdout
    assert "fipo did not log dynamic_sampling/rounds." in run.stdout
    drawn = {"length", "reward", "stability", "influence", "behaviour"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == drawn
    widths = {name: Image.open(tmp_path / "out" / f"{name}.png").width for name in drawn}
    assert widths["length"] == widths["influence"] > widths["stability"] > widths["reward"]  # 5, 3 and 2 panels

    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(drawn)
    for image in images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"
        assert image["alt"]
    # Self-contained, and nothing that a name holds becomes a tag
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))
    assert "<b>TRL</b>" in page.texts
    table = [text for text in page.texts if text.strip()]
    for name in ("fipo/1", "fipo/2", "grpo"):
        rewards = Run(tmp_path / name).end("reward")
        assert f"{rewards:.4g}" in table


def test_bands_and_lines_are_where_the_values_are(tmp_path, monkeypatch):
    """The vertices that matplotlib is given, against numpy."""
    drawn = []
    from matplotlib.axes import Axes

    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: drawn.append((list(x), list(y))) or plot(self, x, y, **k)
    )
    monkeypatch.setattr(
        Axes, "fill_between", lambda self, *xyz, **k: drawn.append([list(v) for v in xyz]) or fill(self, *xyz, **k)
    )
    values = np.random.default_rng(1).normal(size=(3, 6))
    for i, row in enumerate(values):  # the last run is one row shorter
        write_run(tmp_path / "arm" / str(i), rows_of(row[: 6 - (i == 2)].tolist()))
    write_report(find_arms([str(tmp_path / "arm")]), tmp_path / "out")
    line, band = drawn[0], drawn[1]
    expected = [*values[:, :5].T, values[:2, 5]]
    assert line[0] == band[0] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(line[1], [column.mean() for column in expected])
    np.testing.assert_allclose(band[1], [column.min() for column in expected])
    np.testing.assert_allclose(band[2], [column.max() for column in expected])


def test_a_run_that_began_as_another_trainers(tmp_path):
    """Rows of plain GRPO, then rows of FIPO, which count generations: the updates are the clock that all rows have."""
    rows = rows_of([1.0, 2.0]) + [
        {"loss": 0.0, "step": step, "reward": 3.0, "rollout_iteration": 1} for step in (3, 4)
    ]
    write_run(tmp_path / "run", rows)
    write_run(tmp_path / "fipo", rows_of([1.0], clock=lambda step: step))
    missing = write_report(find_arms([str(tmp_path / "run"), str(tmp_path / "fipo")]), tmp_path / "out")
    assert (tmp_path / "out" / "reward.png").exists()
    assert "run did not log dynamic_sampling/rounds" in " ".join(missing)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
def test_ticks_are_whole_numbers(tmp_path, monkeypatch, rows):
    """There is no update 1.5."""
    figures = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    write_run(tmp_path / "run", rows_of([float(value) for value in range(rows)]))
    write_report(find_arms([str(tmp_path / "run")]), tmp_path / "out")
    assert figures
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert shown
        assert all(tick == int(tick) for tick in shown)


def test_collapse_is_drawn_where_the_alarm_fires(tmp_path):
    good = write_run(tmp_path / "good", collapsing(60, at=None))
    bad = write_run(tmp_path / "bad", collapsing(60, at=40))
    write_report(find_arms([str(good)]), tmp_path / "one")
    assert not (tmp_path / "one" / "collapse.png").exists()
    write_report(find_arms([str(good), str(bad)]), tmp_path / "two")
    assert (tmp_path / "two" / "collapse.png").exists()
    assert "update 40: " in (tmp_path / "two" / "report.html").read_text()


def test_figures_cover_what_the_paper_plots():
    """Section by section, under the names that the trainers log."""
    metrics = {metric for figure in FIGURES.values() for metric in figure.panels}
    lengths = {f"completions/{name}_length" for name in ("min", "q25", "mean", "median", "q75")}
    assert set(FIGURES["length"].panels) == lengths
    assert {"reward", "dynamic_sampling/rounds", "completions/length_weighted_advantage"} <= metrics
    assert {"policy/kl", "grad_norm", "entropy"} <= metrics
    assert {"fipo/influence_weight/mean", "policy/dual_clip_fraction", "clip_ratio/region_mean"} <= metrics
