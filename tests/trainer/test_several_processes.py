import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from held import REWARD, HeldRun
from tiny import PROMPTS, distance, make_model


TESTS = Path(__file__).parents[1]
CONFIG = TESTS.parent / "recipes" / "accelerate" / "two_cpu_processes.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
LAUNCH += ["--main_process_port", "0"]  # a free port: tests run side by side
pytestmark = pytest.mark.slow
SETTINGS = {
    "num_iterations": 3,
    "max_steps": 6,
    "optim": "sgd",  # Adam would turn the rounding of a gradient near 0 into a step of any sign
    "learning_rate": 0.2,
    "influence_weight_min": 0.8,  # at 1.0 rounding would decide whether a weight of 1 is at the bound
}

LOGGED = ("fipo/", "policy/", "completions/", "behaviour/", "rollout_iteration", "optimizer_update", "grad_norm")


def train(folder, processes, settings):
    launcher = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else [sys.executable]
    result = folder / f"on_{processes}"
    command = [
        *launcher,
        str(TESTS / "trainer" / "train_on_ranks.py"),
        str(result),
        str(folder / f"run_on_{processes}"),
    ]
    run = subprocess.run([*command, json.dumps(settings)], capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode == 0, run.stderr
    return torch.load(result, weights_only=True)


def assert_equal(one, several, processes, names):
    assert (one["world_size"], several["world_size"]) == (1, processes)
    moved = distance(one["parameters"], dict(make_model().named_parameters()))
    assert distance(one["parameters"], several["parameters"]) < 1e-3 * moved
    rows = [row for row in one["log"] if "loss" in row]
    for mine, theirs in zip(rows, [row for row in several["log"] if "loss" in row], strict=True):
        for metric in (name for name in mine if name.startswith(names)):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-3, abs=1e-4), metric
    compared = set().union(*rows)
    assert [name for name in names if not any(metric.startswith(name) for metric in compared)] == []
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "loss_type": "grpo"},
        # Ratios far from 1, so that sequences are dropped on one rank and the denominator changes on both
        {
            "max_steps": 3,
            "learning_rate": 0.5,
            "influence_weight_min": 0.5,
            "delta": 1.5,
            "influence_safety_ratio": 1.1,
        },
    ],
    ids=["plain", "accumulation", "drops"],
)
def test_two_processes_equal_one(tmp_path, settings):
    steps = settings.get("gradient_accumulation_steps", 1)
    settings = SETTINGS | {"per_device_train_batch_size": 16, "steps_per_generation": steps} | settings
    one, two = (train(tmp_path, processes, settings) for processes in (1, 2))
    rows = assert_equal(one, two, 2, names=(*LOGGED, "engine_mismatch/"))
    assert len(rows) == settings["max_steps"]
    assert sum(row["fipo/active_fraction"] for row in rows) > 0
    assert sum(row.get("engine_mismatch/nan_tokens", 0) for row in rows) > 0
    if settings.get("delta") == 1.5:
        assert sum(row["fipo/dropped_sequence_fraction"] for row in rows) > 0


@pytest.mark.parametrize(
    ("processes", "completions", "generations", "more"),
    [  # 6 completions per process in groups of 4; 8 in groups of 6
        (2, 12, 4, {"dynamic_sampling_skip": True, "prompts": PROMPTS[:8], "max_steps": 16, "learning_rate": 0.02}),
        (3, 24, 6, {"dynamic_sampling_carry_over": True}),
    ],
    ids=["skip", "carry over"],
)
def test_dynamic_sampling_keeps_the_same_groups_on_several_processes(
    tmp_path, processes, completions, generations, more
):
    settings = SETTINGS | {
        "per_device_train_batch_size": completions,
        "num_generations": generations,
        "steps_per_generation": 1,
        "num_iterations": 2,
        "dynamic_sampling": True,
        "log_completions": True,
        **more,
    }
    runs = [train(tmp_path, count, settings) for count in (1, processes)]
    rows = assert_equal(*runs, processes, names=("dynamic_sampling/", "completions/", "policy/", "behaviour/"))
    assert max(row.get("dynamic_sampling/rounds", 0) for row in rows) > 1
    if more.get("dynamic_sampling_skip"):
        assert sum(row.get("dynamic_sampling/skipped", 0) for row in rows) > 5
    tables = [sorted((tmp_path / f"run_on_{count}" / "completions").iterdir()) for count in (1, processes)]
    for mine, theirs in zip(*tables, strict=True):
        pandas.testing.assert_frame_equal(pandas.read_parquet(mine), pandas.read_parquet(theirs), rtol=1e-3)


@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_process_stops_both_at_the_same_update(tmp_path, signalled):
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--per_device_train_batch_size", "8", *REWARD]
    command = [*LAUNCH, "scripts/train_fipo.py", *arguments, "--output_dir", str(tmp_path / "run")]
    with HeldRun(command, tmp_path / "held", generation=2, processes=2) as run:
        run.signal(signal.SIGTERM, run.ranks[signalled])  # the other must stop at the same update
        run.let_go()
    assert "Stopped at update 9," in run.log.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    states = [torch.load(checkpoint / f"generation_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["step"] == states[1]["step"] == int(checkpoint.name.split("-")[1]) == 9
    assert states[0]["layout"]["world_size"] == 2
