import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny import distance, make_model


TESTS = Path(__file__).parent
CONFIG = TESTS.parent / "recipes" / "accelerate" / "two_cpu_processes.yaml"
REDUCED = ("fipo/", "policy/", "completions/", "behaviour/", "rollout_iteration", "optimizer_update", "grad_norm")
TWO_PROCESSES = ["--config_file", str(CONFIG), "--main_process_port", "0"]  # a free port: tests run side by side


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
    settings = {
        "per_device_train_batch_size": 16,
        "steps_per_generation": settings.get("gradient_accumulation_steps", 1),
        "num_iterations": 3,
        "max_steps": 6,
        "optim": "sgd",  # Adam would turn the rounding of a gradient near 0 into a step of any sign
        "learning_rate": 0.2,
        "influence_weight_min": 0.8,  # at 1.0 rounding would decide whether a weight of 1 is at the bound
        **settings,
    }
    results = []
    for name, launcher in [
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES]),
    ]:
        command = [*launcher, str(TESTS / "train_on_ranks.py"), str(tmp_path / name), str(tmp_path / f"{name}_run")]
        run = subprocess.run([*command, json.dumps(settings)], capture_output=True, text=True, cwd=TESTS.parent)
        assert run.returncode == 0, run.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    one, two = results
    assert (one["world_size"], two["world_size"]) == (1, 2)
    moved = distance(one["parameters"], dict(make_model().named_parameters()))
    assert distance(one["parameters"], two["parameters"]) < 1e-3 * moved
    rows = [row for row in one["log"] if "loss" in row]
    assert len(rows) == settings["max_steps"]
    assert sum(row["fipo/active_fraction"] for row in rows) > 0
    assert sum(row.get("engine_mismatch/nan_tokens", 0) for row in rows) > 0
    if settings.get("delta") == 1.5:
        assert sum(row["fipo/dropped_sequence_fraction"] for row in rows) > 0
    for mine, theirs in zip(rows, [row for row in two["log"] if "loss" in row], strict=True):
        for metric in (name for name in mine if name.startswith(REDUCED)):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-3, abs=1e-4), metric


@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_process_stops_both_at_the_same_update(tmp_path, signalled):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES]
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--per_device_train_batch_size", "8", "--logging_steps", "1"]
    command = [*launcher, "scripts/train_fipo.py", *arguments, "--output_dir", str(tmp_path / "run")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=TESTS.parent, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while "'loss'" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        psutil.Process(process.pid).children()[signalled].terminate()  # the other must stop at the same update
        process.wait(timeout=60)
    assert "Stopped at update" in log.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    states = [torch.load(checkpoint / f"generation_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["step"] == states[1]["step"] == int(checkpoint.name.split("-")[1])
    assert states[0]["layout"]["world_size"] == 2
    with pytest.raises(ProcessLookupError):  # nobody is left behind
        os.killpg(process.pid, signal.SIGKILL)
