"""The benchmarks run, and what they print is the table that their help promises. No test guards a time."""

import re
import runpy
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        ("future-kl", ["ours, ms", "block sum, ms", "serial scan, ms", "one exp, ms"]),
        ("update", ["FIPOTrainer, s", "GRPOTrainer, s", "ungrouped, s", "trimmed, s", "not padding"]),
        (
            "monitoring",
            ["FIPOTrainer, ms", "FIPOTrainer: share", "DAPOTrainer: monitoring, ms", "DAPOTrainer: share"],
        ),
        ("memory", ["peak, (B, T) float32", "influence_weights, ms", "share"]),
        ("evaluation", ["batch_size", "s", "times as fast", "avg@8"]),
        ("dynamic-sampling", ["keep rate", "least possible", "auto", "3x (DAPO)", "4x (FIPO)"]),
        ("code-reward", ["isolated, ms", "limits only, ms", "isolation, ms", "answers/s"]),
    ],
)
def test_quick(monkeypatch, capsys, command, columns):
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", command, "--quick"])
    runpy.run_path("scripts/benchmark.py", run_name="__main__")
    printed = capsys.readouterr().out
    header, _, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert all(column in header for column in columns)
    assert len(rows) == (9 if command == "dynamic-sampling" else 2)
    assert f"python scripts/benchmark.py {command} --quick" in printed
    if command == "future-kl":
        errors = [float(cell) for cell in re.findall(r" (\de[-+]\d\d) \|", rows[0])]
        assert len(errors) == 3
        assert max(errors) < 1e-5  # all three compute the same thing
    if command == "code-reward":
        assert "2 answers of 0.1 s of CPU time, 2 right" in printed
    if command == "update":
        shares = [float(share) for share in rows[1].split("|")[-2].split(",")]
        grouped, grpo, ungrouped, trimmed = shares
        assert grouped > trimmed > grpo == ungrouped
