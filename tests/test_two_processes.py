import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


TESTS = Path(__file__).parent
TWO_PROCESSES = TESTS.parent / "recipes" / "accelerate" / "two_cpu_processes.yaml"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "loss_type": "grpo"},
        # Ratios far from 1, so that sequences are dropped on one rank and the denominator changes on both
        {"learning_rate": 0.3, "influence_weight_min": 0.5, "delta": 1.5, "influence_safety_ratio": 1.1},
    ],
    ids=["plain", "accumulation", "drops"],
)
def test_two_processes_equal_one(tmp_path, settings):
    settings = {
        "per_device_train_batch_size": 16,
        "steps_per_generation": settings.get("gradient_accumulation_steps", 1),
        "num_iterations": 3,
        "max_steps": 6,
        **settings,
    }
    results = []
    for name, launcher in [
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]),
    ]:
        command = [*launcher, str(TESTS / "train_on_ranks.py"), str(tmp_path / name), str(tmp_path / f"{name}_run")]
        run = subprocess.run([*command, json.dumps(settings)], capture_output=True, text=True, cwd=TESTS.parent)
        assert run.returncode == 0, run.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    one, two = results
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-4, atol=1e-5)
    rows = [row for row in one["log"] if "loss" in row]
    assert len(rows) == 6
    assert sum(row["fipo/active_fraction"] for row in rows) > 0
    assert sum(row.get("fipo/engine_mismatch/nan_tokens", 0) for row in rows) > 0
    if settings.get("delta") == 1.5:
        assert sum(row["fipo/dropped_sequence_fraction"] for row in rows) > 0
    for mine, theirs in zip(rows, [row for row in two["log"] if "loss" in row], strict=True):
        for metric in (name for name in mine if name.startswith("fipo/") or name == "grad_norm"):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-3, abs=1e-4), metric
