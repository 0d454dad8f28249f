import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import train_on_ranks
from held import REWARD, HeldRun
from tiny import distance, make_model


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
WHOLE = SETTINGS | {"per_device_train_batch_size": 16, "steps_per_generation": 1}
EQUAL = {
    "plain": WHOLE,
    "accumulation": WHOLE | {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
    # Ratios far from 1, so that sequences are dropped on one rank and the denominator changes on both
    "drops": WHOLE
    | {"max_steps": 3, "learning_rate": 0.5, "influence_weight_min": 0.5}
    | {"delta": 1.5, "influence_safety_ratio": 1.1},
}
SAMPLED = SETTINGS | {
    "steps_per_generation": 1,
    "num_iterations": 2,
    "dynamic_sampling": True,
    "log_completions": True,
}
DYNAMIC = {  # and on how many processes
    "six completions each, in groups of 4": (
        2,
        SAMPLED | {"per_device_train_batch_size": 12, "num_generations": 4, "dynamic_sampling_carry_over": False},
    ),
    "eight each, in groups of 6": (
        3,
        SAMPLED | {"per_device_train_batch_size": 24, "num_generations": 6, "dynamic_sampling_carry_over": True},
    ),
}

LOGGED = ("fipo/", "policy/", "completions/", "behaviour/", "rollout_iteration", "optimizer_update", "grad_norm")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A name and the number of processes -> the folder of that run, and what came out of it.

    One process is this one. Several are started once, for all that is to be trained on so many.
    """
    folder = tmp_path_factory.mktemp("runs")

    def settings_of(processes):
        both = {name: settings for name, (count, settings) in DYNAMIC.items() if processes in (1, count)}
        return both | (EQUAL if processes in (1, 2) else {})

    @functools.cache
    def launch(processes):
        runs = {str(folder / f"{name}_on_{processes}"): each for name, each in settings_of(processes).items()}
        for run in runs:
            Path(run).mkdir()
        command = [*LAUNCH, "--num_processes", str(processes), train_on_ranks.__file__, json.dumps(runs)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr

    def run(name, processes):
        place = folder / f"{name}_on_{processes}"
        if processes > 1:
            launch(processes)
        else:
            place.mkdir()
            train_on_ranks.train(place, settings_of(1)[name])
        return place / "run", torch.load(place / "result", weights_only=True)

    return run


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


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(train, name):
    (_, one), (_, two) = (train(name, processes) for processes in (1, 2))
    rows = assert_equal(one, two, 2, names=(*LOGGED, "engine_mismatch/"))
    assert len(rows) == EQUAL[name]["max_steps"]
    assert sum(row["fipo/active_fraction"] for row in rows) > 0
    assert sum(row.get("engine_mismatch/nan_tokens", 0) for row in rows) > 0
    if name == "drops":
        assert sum(row["fipo/dropped_sequence_fraction"] for row in rows) > 0


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_sampling_keeps_the_same_groups_on_several_processes(train, name):
    processes = DYNAMIC[name][0]
    (folder, one), (other, several) = (train(name, count) for count in (1, processes))
    rows = assert_equal(one, several, processes, ("dynamic_sampling/", "completions/", "policy/", "behaviour/"))
    assert max(row.get("dynamic_sampling/rounds", 0) for row in rows) > 1
    tables = [sorted((each / "completions").iterdir()) for each in (folder, other)]
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
