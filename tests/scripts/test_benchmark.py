"""The benchmarks run, and what they print is the table that their help promises. No test guards a time."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        ("future-kl", ["ours, ms", "block sum, ms", "serial scan, ms", "one exp, ms"]),
        ("update", ["FIPOTrainer, s", "GRPOTrainer, s", "ungrouped, s", "trimmed, s", "not padding"]),
        (
            "monitoring",
            ["FIPOTrainer, ms", "FIPOTrainer: share", "DAPOTrainer: monitoring, ms", "DAPOTrainer: share"],
        ),
        ("step", ["trainer", "generation", "scoring", "old log-probs", "update", "other", "total", "of GRPO's"]),
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
    first_table, *others = printed.split("\n\n|")
    header, _, *rows = [line for line in first_table.splitlines() if line.startswith("|")]
    assert all(column in header for column in columns)
    assert len(rows) == {"dynamic-sampling": 9, "step": 6}.get(command, 2)
    assert f"python scripts/benchmark.py {command} --quick" in printed
    if command == "dynamic-sampling":
        (table,) = others
        *epochs, total = [line.split("|")[1:-1] for line in table.splitlines() if line.count("|") == 9][1:]
        auto, skip, posterior = (float(cell) for cell in total[1:4])
        assert 1 < skip < auto
        assert 1 < posterior < auto
        assert len(set(map(float, epochs[0][1:4]))) == 1  # nothing is skipped in the first pass
    if command == "future-kl":
        errors = [float(cell) for cell in re.findall(r" (\de[-+]\d\d) \|", rows[0])]
        assert len(errors) == 3
        assert max(errors) < 1e-5  # all three compute the same thing
    if command == "code-reward":
        assert "2 answers of 0.1 s of CPU time, 2 right" in printed
    if command == "step":
        for row in rows:
            *parts, total, _ = map(float, row.split("|")[3:-1])
            assert sum(parts) == pytest.approx(total, rel=0.1)
            assert min(parts) >= 0
    if command == "update":
        shares = [float(share) for share in rows[1].split("|")[-2].split(",")]
        grouped, grpo, ungrouped, trimmed = shares
        assert grouped > trimmed > grpo == ungrouped


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_lora_sync():
    """In a process of its own, as vLLM's engines stay until it ends."""
    run = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "lora-sync", "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert run.returncode == 0, run.stderr
    header, _, *rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in header]
    assert len(rows) == 2
    for row in rows:
        cells = dict(zip(columns, (float(cell.split()[0]) if i else None for i, cell in enumerate(row)), strict=True))
        assert 0 < cells["adapter, MB"] < 0.05 * cells["merged, MB"]
        assert cells["base moved, adapter"] == 0
        assert max(cells["mismatch, adapter"], cells["mismatch, merged"]) < cells["mismatch, sync cut"] / 3
    assert "python scripts/benchmark.py lora-sync --quick" in run.stdout
