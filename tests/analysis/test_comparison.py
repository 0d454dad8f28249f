"""Means over seeds, paired differences and tables, against numbers worked out by hand."""

import json
import math

import pytest
from conftest import ROOT
from datasets import Dataset
from PIL import Image

from fipo_trl.analysis.comparison import (
    area,
    cell,
    compare,
    compare_endpoints,
    curves_of,
    draw_curves,
    draw_differences,
    endpoint_table,
    holm,
    metrics_of,
    over_seeds,
    paired_t_test,
    row_of,
    table,
    updates_to,
)
from fipo_trl.analysis.report import Run
from fipo_trl.analysis.study_results import read_part
from fipo_trl.evaluation.results import write_results


def make_run(folder, rewards, **columns):
    """A run that logged a row every 8 updates."""
    rows = [
        {"step": 8 * number, "loss": 0.1, "reward": reward, "grad_norm": 0.5, "step_time": 0.25}
        for number, reward in enumerate(rewards, start=1)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name.replace("__", "/")] = value
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"], "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return Run(folder)


def test_interval_over_seeds():
    # Student's t at 0.975 with 4 degrees of freedom is 2.7764; the standard deviation of 1 to 5 is the root of 2.5
    value, low, high = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert value == 3.0
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert over_seeds([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert over_seeds([0.5]) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    # Student's interval of two seeds is 12.7 times their distance: 89.4 [8.3, 170.5] of 100 was one
    assert over_seeds([1.0, math.nan, 2.0]) == pytest.approx((math.nan,) * 3, nan_ok=True)
    assert over_seeds([0.83, 0.958]) == pytest.approx((0.894, math.nan, math.nan), nan_ok=True)


def test_differences_are_taken_seed_by_seed():
    control = {1: {"avg@32": 0.5}, 2: {"avg@32": 0.9}, 3: {"avg@32": 0.7}, 4: {"avg@32": 0.0}}
    arm = {
        2: {"avg@32": 0.95, "fipo/future_kl": 0.1},
        1: {"avg@32": 0.55, "fipo/future_kl": 0.3},
        3: {"avg@32": 0.75, "fipo/future_kl": 0.2},
    }
    compared = compare({"DAPO": control, "FIPO": arm})
    # Whatever differs between the seeds drops out, and seed 4, which the arm lacks, does not count
    assert compared["FIPO"]["minus_control"]["avg@32"] == pytest.approx((0.05, 0.05, 0.05))
    assert compared["FIPO"]["mean"]["avg@32"].value == pytest.approx(0.75)
    assert compared["FIPO"]["mean"]["avg@32"].high > 1
    assert compared["DAPO"]["mean"]["avg@32"].value == pytest.approx(2.1 / 4)
    assert "fipo/future_kl" not in compared["FIPO"]["minus_control"]


@pytest.mark.parametrize(
    ("rewards", "updates"),
    [
        ([0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 40),  # (0.5 + 1 + 1) / 3 is the first above 0.8
        ([1.0] * 10, 24),  # three rows are needed
        ([0.1] * 9 + [1.0], math.nan),
    ],
)
def test_updates_to_80_percent_of_the_final_reward(tmp_path, rewards, updates):
    assert updates_to(make_run(tmp_path, rewards)) == pytest.approx(updates, nan_ok=True)


def test_metrics_of_a_run(tmp_path):
    columns = {"policy__kl": [0.1, 0.2, 0.3, 0.4], "fipo__masked_fraction": [0, 0, 0, 1]}
    columns |= {"dynamic_sampling__generated": [16, 20, 30, 34], "rollout_iteration": [2, 4, 6, 8]}  # two to a row
    run = make_run(tmp_path / "run", [0.5] * 4, **columns)
    run.rows[2]["grad_norm"] = 2.5
    texts = ["A:2", "a3:3 A:3", "a3:3 ?a3:3 A:3", "a3:3 ?a3:3 ?a3:3 A:3"]
    samples = [
        [
            {
                "completion": text,
                "answer": text[-1],
                "correct": text[-1] == "3",
                "length": len(text),
                "truncated": False,
            }
            for text in texts[first : first + 2]
        ]
        for first in (0, 2)
    ]
    problems = Dataset.from_dict({"prompt": ["a3=", "a3="], "solution": ["3", "3"]})
    settings = {"n": 2, "has_answers": True}
    write_results(tmp_path, settings, problems, samples)
    metrics = metrics_of(run, [tmp_path], derivation="[a-z][0-4]:", self_check=r"\?[a-z]")
    assert metrics["avg@2"] == 0.75
    assert metrics["cons@2"] == 0.75  # one tie, one agreement
    assert metrics["pass@2"] == 1.0
    assert metrics["mean_length"] == (3 + 8 + 14 + 20) / 4
    assert metrics["length_median"] == 11
    assert [metrics[f"behaviour/{name}"] for name in ("no_derivation", "one_chain")] == [0.25, 0.25]
    assert [metrics[f"behaviour/{name}"] for name in ("one_self_check", "several_self_checks")] == [0.25, 0.25]
    assert (metrics["reward"], metrics["policy/kl"]) == (0.5, 0.25)
    assert metrics["fipo/masked_fraction"] == 0.25
    assert (metrics["grad_norm"], metrics["grad_norm/max"]) == (1.0, 2.5)
    assert (metrics["updates_to_80"], metrics["alarms"]) == (24, 0)
    assert metrics["prompts_sampled"] == 25 * 8
    assert metrics["seconds"] == 0.25 * 32
    assert "fipo/active_fraction" not in metrics


def add_evaluations(run, problems, **metrics):
    """Rows as the evaluation callback logs them, at the given updates."""
    for name, curve in metrics.items():
        for update, value in curve.items():
            run.history.append({"step": update, f"eval_{problems}/{name.replace('__', '@')}": value})


def test_area_under_a_curve():
    # Trapezoids of 10 x 0.25 and 20 x 0.75 over a span of 30
    assert area({0: 0.0, 30: 1.0, 10: 0.5}) == pytest.approx(17.5 / 30)
    assert area({4: 0.25, 8: 0.25}) == 0.25


def test_held_out_accuracy_over_training(tmp_path):
    run = make_run(tmp_path / "run", [0.5] * 4)
    add_evaluations(run, "data", avg__4={0: 0.0, 16: 0.5, 32: 1.0}, mean_length={0: 8.0, 32: 12.123456})
    curves = {"avg@4": {0: 0.0, 16: 0.5, 32: 1.0}, "mean_length": {0: 8.0, 32: 12.12346}}
    assert curves_of(run) == curves
    metrics = metrics_of(run)
    assert (metrics["avg@4"], metrics["auc_avg@4"], metrics["mean_length"]) == (1.0, 0.5, 12.12346)
    add_evaluations(run, "more", avg__4={0: 0.25, 32: 0.75})
    assert curves_of(run).keys() == {"data: avg@4", "data: mean_length", "more: avg@4"}
    assert metrics_of(run)["more: auc_avg@4"] == 0.5

    # What `fipo-trl evaluate` found of the last weights takes the place of the last evaluation in training
    problems = Dataset.from_dict({"prompt": ["a3="], "solution": ["3"]})
    sample = {"completion": "A:3", "answer": "3", "correct": True, "length": 3, "truncated": False}
    write_results(tmp_path, {"n": 1, "has_answers": True}, problems, [[sample]])
    metrics = metrics_of(run, [tmp_path])
    assert (metrics["avg@1"], metrics["mean_length"]) == (1.0, 3)
    assert "data: avg@4" not in metrics
    assert metrics["data: auc_avg@4"] == 0.5


def test_paired_t_test():
    # t = 3 / sqrt(2.5 / 5), 4 degrees of freedom: F(t) = 1/2 + 3/8 u (1 - u^2 / 12), u = t / sqrt(1 + t^2 / 4)
    u = math.sqrt(18 / 5.5)
    assert paired_t_test([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 * (0.5 - 3 / 8 * u * (1 - u**2 / 12)))
    assert paired_t_test([-1.0, -2.0, -3.0, -4.0, -5.0]) == paired_t_test([1.0, 2.0, 3.0, 4.0, 5.0])
    assert paired_t_test([1.0, -1.0, 0.0]) == 1.0
    assert paired_t_test([0.25, 0.25, 0.25]) == 0.0
    assert math.isnan(paired_t_test([0.1, 0.2]))
    assert math.isnan(paired_t_test([0.1, 0.2, math.nan]))


def test_holms_correction():
    # By hand: 0.005 x 4; 0.01 x 3; 0.03 x 2; 0.04 x 1 is below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == [0.8, 0.8]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, math.nan, 0.04], nan_ok=True)
    assert holm([]) == []


def test_endpoints_are_tested_together(tmp_path):
    control = {seed: {"avg@8": 0.5, "mean_length": 60.0} for seed in range(1, 6)}
    better = {seed: {"avg@8": 0.5 + seed / 100, "mean_length": 60.0} for seed in range(1, 6)}
    few = {seed: {"avg@8": 0.6, "mean_length": 60.0} for seed in (1, 2)}
    runs = {"DAPO": control, "better": better, "few": few, "none": {}}
    tested = compare_endpoints(runs, ("avg@8", "mean_length"))
    assert tested.keys() == {"better", "few", "none"}
    p = paired_t_test([0.01, 0.02, 0.03, 0.04, 0.05])
    assert tested["better"]["avg@8"] == pytest.approx((5, p, 6 * p))  # 3 arms x 2 endpoints, also those to come
    assert tested["better"]["mean_length"] == (5, 1.0, 1.0)
    assert tested["few"]["avg@8"] == pytest.approx((2, math.nan, math.nan), nan_ok=True)
    assert tested["none"]["avg@8"].seeds == 0
    compared = compare({arm: seeds for arm, seeds in runs.items() if seeds})
    assert endpoint_table(compared, tested).splitlines() == [
        "| endpoint | arm | minus DAPO | seeds | p | p, Holm |",
        "|---|---|---|---|---|---|",
        "| avg@8, % | better | +3.0 [+1.0, +5.0] | 5 | 0.0132 | 0.0794 |",
        "| avg@8, % | few | +10.0 | 2 | - | - |",
        "| avg@8, % | none | - | 0 | - | - |",
        "| mean length, tokens | better | +0.0 [+0.0, +0.0] | 5 | 1.0000 | 1.0000 |",
        "| mean length, tokens | few | +0.0 | 2 | - | - |",
        "| mean length, tokens | none | - | 0 | - | - |",
    ]
    curves = {"DAPO": {seed: {"avg@8": {0: 0.1, 8: seed / 10}} for seed in (1, 2, 3)}, "few": {1: {"avg@8": {0: 0.1}}}}
    draw_curves(curves, tmp_path / "held_out.png")
    assert Image.open(tmp_path / "held_out.png").width > 400


def test_tables_and_figure(tmp_path):
    control = {seed: {"avg@32": 0.9, "mean_length": 60.0 + seed} for seed in (1, 2, 3)}
    arm = {seed: {"avg@32": 0.9, "mean_length": 62.0 + 2 * seed, "fipo/active_fraction": 0.5} for seed in (1, 2, 3)}
    compared = compare({"DAPO": control, "FIPO": arm})
    assert table(compared, "mean").splitlines() == [
        "| | DAPO | FIPO |",
        "|---|---|---|",
        "| avg@32, % | 90.0 [90.0, 90.0] | 90.0 [90.0, 90.0] |",
        "| mean length, tokens | 62.0 [59.5, 64.5] | 66.0 [61.0, 71.0] |",
        "| weights other than 1, % | - | 50.0 [50.0, 50.0] |",
    ]
    assert table(compared, "minus_control").splitlines()[2:] == [
        "| avg@32, % | +0.0 [+0.0, +0.0] |",
        "| mean length, tokens | +4.0 [+1.5, +6.5] |",
    ]
    draw_differences(compared, ["avg@32", "mean_length"], tmp_path / "differences.png")
    assert Image.open(tmp_path / "differences.png").width > 500
    assert all(row_of(metric) for metric in ("avg@32", "cons@32", "pass@32"))


def test_tables_without_intervals_of_two_seeds(tmp_path):
    control = {1: {"avg@8": 0.83}, 2: {"avg@8": 0.958}}
    arm = {1: {"avg@8": 0.84}, 2: {"avg@8": 0.948}}
    compared = compare({"DAPO": control, "FIPO": arm})
    assert table(compared, "mean").splitlines()[2:] == ["| avg@8, % | 89.4 | 89.4 |"]
    assert table(compared, "minus_control").splitlines()[2:] == ["| avg@8, % | +0.0 |"]
    draw_differences(compared, ["avg@8"], tmp_path / "differences.png")
    assert Image.open(tmp_path / "differences.png").width > 300


def test_rows_of_several_sets_of_problems_come_first():
    metrics = {"aime25: avg@16": 0.1, "aime25: mean_length": 5.0, "aime24: avg@16": 0.2, "reward": 0.3, "other": 1.0}
    assert [line.split(" | ")[0] for line in table(compare({"A": {1: metrics}}), "mean").splitlines()[2:]] == [
        "| aime24: avg@16, %",
        "| aime25: avg@16, %",
        "| aime25: mean length, tokens",
        "| reward, mean over training, %",
    ]


def test_what_a_run_did_not_log_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", [0.5] * 4)
    for row in run.rows:
        del row["reward"], row["grad_norm"], row["step_time"]
    assert metrics_of(run) == {"updates": 32.0, "alarms": 0.0}
    # And so is what not every run of an arm logged
    compared = compare({"A": {1: {"reward": 0.5, "entropy": 1.0}, 2: {"reward": 0.7}}, "B": {2: {"entropy": 1.0}}})
    assert compared["A"]["mean"].keys() == {"reward"}
    assert compared["B"]["minus_control"] == {}


def test_tables_of_the_study_are_those_of_its_results():
    folder = ROOT / "recipes" / "tiny"
    results = json.loads((folder / "study" / "results.json").read_text())
    compared = compare({arm: part["runs"] for arm, part in results["arms"].items()})
    text = (folder / "README.md").read_text()
    for kind in ("mean", "minus_control"):
        assert table(compared, kind) in text
        for arm, part in compared.items():
            expected = {name: list(interval) for name, interval in part[kind].items()}
            assert expected == {name: pytest.approx(values) for name, values in results["arms"][arm][kind].items()}
    readme = (ROOT / "README.md").read_text()
    for arm in list(compared)[:3]:
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| {arm}") and "[" in line.split("|")[2])
        for metric in ("avg@32", "mean_length"):
            for kind in ("mean", "minus_control")[: 1 + (arm != "DAPO")]:
                assert cell(compared[arm][kind][metric], row_of(metric), signed=kind != "mean") in row


def test_tables_of_the_calibrated_study_are_those_of_its_results():
    folder, endpoints = ROOT / "recipes" / "calibrated", ("reward", "avg@4", "mean_length")
    results = read_part(folder / "results.json")
    runs = {arm: part["runs"] for arm, part in results["arms"].items()}
    compared, tested = compare(runs), compare_endpoints(runs, endpoints)
    text = (folder / "README.md").read_text()
    shown = {name: row_of(name)._replace(decimals=0 if name == "mean_length" else 1) for name in endpoints}
    for arm, part in compared.items():
        cells = [
            cell(part[kind][name], row, signed=kind != "mean") if kind == "mean" or arm != "DAPO" else ""
            for name, row in shown.items()
            for kind in ("mean", "minus_control")
        ]
        assert f"| {arm} | {' | '.join(cells)} |".replace("|  |", "| |") in text
    for arm, tests in tested.items():
        cells = [f"{tests[name].p:.3f}" for name in endpoints] + [f"{tests[name].p_holm:.2f}" for name in endpoints]
        assert f"| {arm} | {' | '.join(cells)} |" in text
    again = {arm: part["runs"] for arm, part in read_part(folder / "confirmation.json")["arms"].items()}
    every = {arm: runs[arm] | seeds for arm, seeds in again.items()}
    for more in (again, every):
        assert cell(compare(more)["oracle"]["minus_control"]["reward"], shown["reward"], signed=True) in text
