"""The benchmarks run, and what they print is the table that their help promises. No test guards a time."""

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        ("future-kl", ["ours, ms", "block sum, ms", "serial scan, ms", "one exp, ms"]),
        pytest.param(
            "update",
            ["FIPOTrainer, s", "GRPOTrainer, s", "ungrouped, s", "trimmed, s", "not padding"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "monitoring",
            ["FIPOTrainer, ms", "FIPOTrainer: share", "DAPOTrainer: monitoring, ms", "DAPOTrainer: share"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "step",
            ["trainer", "generation", "scoring", "old log-probs", "update", "other", "total", "of GRPO's"],
            marks=pytest.mark.slow,
        ),
        pytest.param("memory", ["peak, (B, T) float32", "influence_weights, ms", "share"], marks=pytest.mark.slow),
        pytest.param(
            "dynamic-sampling",
            ["keep rate", "least possible", "auto", "3x (DAPO)", "4x (FIPO)"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quick(command, columns):
    run = subprocess.run([sys.executable, "scripts/benchmark.py", command, "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first_table, *others = run.stdout.split("\n\n|")
    header, _, *rows = [line for line in first_table.splitlines() if line.startswith("|")]
    assert all(column in header for column in columns)
    assert len(rows) == {"dynamic-sampling": 9, "step": 6}.get(command, 2)
    assert f"python scripts/benchmark.py {command} --quick" in run.stdout
    if command == "dynamic-sampling":
        (table,) = others
        *epochs, total = [line.split("|")[1:-1] for line in table.splitlines() if line.count("|") == 8][1:]
        auto, skip = (float(cell) for cell in total[1:3])
        assert 1 < skip < auto
        assert epochs[0][1] == epochs[0][2]  # nothing is skipped in the first pass
    if command == "future-kl":
        errors = [float(cell) for cell in re.findall(r" (\de[-+]\d\d) \|", rows[0])]
        assert len(errors) == 3
        assert max(errors) < 1e-5  # all three compute the same thing
    if command == "step":
        for row in rows:
            *parts, total, _ = map(float, row.split("|")[3:-1])
            assert sum(parts) == pytest.approx(total, rel=0.1)
            assert min(parts) >= 0
    if command == "update":
        shares = [float(share) for share in rows[1].split("|")[-2].split(",")]
        grouped, grpo, ungrouped, trimmed = shares
        assert grouped > trimmed > grpo == ungrouped
