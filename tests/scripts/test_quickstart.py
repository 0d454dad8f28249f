"""The promise of the README, kept in full: the quickstart, and the same task through LoRA."""

import json
import subprocess
import sys

import pytest
from peft import AutoPeftModelForCausalLM
from PIL import Image


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "goal"), [("fipo", 0.85), ("fipo_lora", 0.6)])
def test_quickstart(tmp_path, recipe, goal):
    command = [sys.executable, "scripts/quickstart.py", "--config", f"recipes/tiny/{recipe}.yaml"]
    run = subprocess.run([*command, "--output_dir", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert summary["base"]["avg@8"] <= 0.5
    assert summary["trained"]["avg@8"] >= goal
    assert summary["trained"]["mean_length"] > summary["base"]["mean_length"]
    assert summary["active_fraction"] > 0.1
    assert summary["updates"] == 320
    assert sum(summary["trained"]["behaviours"].values()) == pytest.approx(1)
    assert f"{summary['trained']['avg@8']:.1%}" in run.stdout
    assert Image.open(tmp_path / "training.png").width > 1000
    assert (tmp_path / "report" / "report.html").exists()
    assert not (tmp_path / "report" / "collapse.png").exists()  # a healthy run: no alarm
    behaviours = [row for row in history if "behaviour/one_chain" in row]
    assert len(behaviours) == 40
    for row in behaviours:
        assert sum(row[name] for name in row if name.startswith("behaviour/")) == pytest.approx(1)
    if recipe == "fipo_lora":
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
        assert model.active_adapters == ["default"]
