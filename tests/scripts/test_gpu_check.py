"""The check of a GPU, on a machine without one: the parts that need none, and what it says of the others."""

import json
import subprocess
import sys

import gpu_check
import pytest
import torch


def test_the_parts_that_need_no_gpu():
    results = {}
    for name in ("golden", "share_of_fipo", "memory", "nccl", "colocated", "quickstart"):
        results[name] = gpu_check.part_result(name, "cpu")
    assert {name for name, result in results.items() if result["status"] == "ok"} == {"golden", "share_of_fipo"}
    assert {results[name]["error"] for name in ("memory", "nccl", "quickstart")} == {"it needs a GPU"}
    errors = results["golden"]["measured"]
    assert errors["largest error of the loss, float32"] < 1e-5
    assert 1e-5 < errors["largest error of the loss, bfloat16"] < 0.1
    assert 0 < results["share_of_fipo"]["measured"]["share"] < 1


@pytest.mark.slow
def test_report(tmp_path):
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--output_dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    status = {name: part["status"] for name, part in report["parts"].items()}
    ran = ("golden", "share_of_fipo", "update_speed")
    assert status == {name: "ok" if name in ran else "not run" for name in gpu_check.PARTS}
    assert report["parts"]["update_speed"]["measured"]["FIPOTrainer, s"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "| nccl | not run |" in page
    assert "| share | " in page


def test_a_part_that_fails_is_reported_and_decides(tmp_path, monkeypatch):
    failed = {"status": "failed", "error": "RuntimeError: no", "seconds": 1.0}
    monkeypatch.setattr(gpu_check, "PARTS", {"golden": gpu_check.golden})
    monkeypatch.setattr(gpu_check, "run_part", lambda *arguments: failed)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    assert "RuntimeError: no" in (tmp_path / "report.md").read_text()


def test_a_part_that_takes_too_long_fails():
    result = gpu_check.run_part("golden", "cpu", seconds=0)  # it gets one
    assert result["status"] == "failed"
    assert "s that were left" in result["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match=r"torch finds no NVIDIA GPU.*--device cpu"):
        gpu_check.main()
