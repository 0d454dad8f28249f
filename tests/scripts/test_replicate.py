"""scripts/replicate.py from end to end, on two short runs: stopped, gone on with, summarised."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import replicate
from conftest import ROOT
from PIL import Image

from fipo_trl.analysis.study import Commands, Task, run_one
from fipo_trl.recipe.validate import read_and_validate


# A study of {steps} updates that nothing but its size tells from the real one
SHORT = """
import replicate
tiny = ["--config", "recipes/tiny/fipo.yaml", "--max_steps", "{steps}", "--save_steps", "1000",
        "--reward_funcs", "rewards_for_tests.exact_answer_behind_a_gate"]
replicate.STUDIES = {{"short": replicate.Study(
    arms={{"DAPO": [*tiny, "--trainer", "dapo"], "FIPO [1.0, 1.2]": tiny}},
    evaluation=["--dataset", "{problems}", "--reward", "recipes.tiny.running_sums.exact_answer", "--n", "32",
                "--max_tokens", "32"],
    seeds=range(1, 2),
    differences=("avg@32", "mean_length"),
)}}
replicate.main()
"""


def start(tmp_path, steps=32):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "a3b0c4d1=", "solution": "3"}) + "\n")
    code = SHORT.format(steps=steps, problems=problems)
    command = [sys.executable, "-c", code, "--study", "short", "--jobs", "2", "--output_dir", str(tmp_path / "out")]
    gate = {"GATE_FOR_TESTS": str(tmp_path / "gate")}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ["PYTHONPATH"]])}
    environment = os.environ | gate | path
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


@pytest.mark.slow
def test_stopped_study_goes_on(tmp_path):
    root = tmp_path / "out" / "short"
    logs = [root / arm / "seed-1" / "log.txt" for arm in ("DAPO", "FIPO-1.0-1.2")]
    process = start(tmp_path)

    def wait_for(text):
        while not all(log.exists() and text in log.read_text() for log in logs):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)

    # However fast or slow the machine is: both stand in their third generation until the gate opens
    wait_for("waits for the gate")
    second = start(tmp_path)
    assert "Another process works on" in second.communicate()[1]
    assert second.returncode == 1
    process.send_signal(signal.SIGINT)
    wait_for("Stopping after this update")
    (tmp_path / "gate").touch()
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "The same command goes on from here." in errors
    assert not (root / "results.json").exists()
    checkpoints = [list((log.parent / "run").glob("checkpoint-*")) for log in logs]
    assert all(len(saved) == 1 for saved in checkpoints)

    output, errors = (process := start(tmp_path)).communicate()
    assert process.returncode == 0, errors
    results = json.loads((root / "results.json").read_text())
    for arm, log in zip(("DAPO", "FIPO [1.0, 1.2]"), logs, strict=True):
        assert log.read_text().count("'rollout_iteration': 1,") == 1  # it went on, and did not begin again
        history = json.loads((log.parent / "run" / "trainer_state.json").read_text())["log_history"]
        assert [row["step"] for row in history if "reward" in row] == list(range(8, 33, 8))
        evaluated = json.loads((log.parent / "evaluation" / "problems" / "summary.json").read_text())["metrics"]
        assert results["arms"][arm]["runs"]["1"]["avg@32"] == evaluated["avg@32"]["value"]
    assert results["arms"]["FIPO [1.0, 1.2]"]["runs"]["1"]["fipo/active_fraction"] > 0
    assert "fipo/active_fraction" not in results["arms"]["DAPO"]["runs"]["1"]
    assert results["arms"]["DAPO"]["train"][-2:] == ["--trainer", "dapo"]
    assert "| avg@32, % |" in output
    assert "Seeds: 1. Cells are means over the seeds, without intervals" in output
    assert (root / "tables.md").read_text() in output
    for name in ("curves.png", "differences.png"):
        assert Image.open(root / name).width > 500
    assert (root / "report" / "report.html").exists()

    # The runs of other settings would pass for those that were asked for
    _, errors = (process := start(tmp_path, steps=40)).communicate()
    assert process.returncode == 1
    assert "seed-1 holds a run of other arguments" in errors


def test_tiny_study_is_what_its_issue_asks_for():
    study = replicate.STUDIES["tiny"]
    recipes = {arm: read_and_validate(arguments) for arm, arguments in study.arms.items()}
    assert [recipe.run.trainer for recipe in recipes.values()] == ["dapo"] + ["fipo"] * 5
    configs = [recipe.training for recipe in recipes.values()]
    of = [(args.influence_weight_min, args.influence_weight_max, args.future_kl_half_life) for args in configs[1:]]
    assert of == [(1.0, 1.2, 32), (0.8, 1.2, 32), (0.8, 1.2, 32), (0.8, 1.2, 8), (0.8, 1.2, 128)]
    assert [args.future_kl_participation_mask for args in configs[1:]] == [True, True, False, True, True]
    assert {args.updates_per_generation for args in configs} == {8}
    assert len({args.max_steps for args in configs}) == 1
    assert len(study.seeds) >= 5


def test_skip_study_is_what_its_issue_asks_for():
    study = replicate.STUDIES["skip"]
    auto, skip = (read_and_validate(arguments) for arguments in study.arms.values())
    assert (ROOT / auto.run.dataset_name / "train.jsonl").read_text().count("\n") == 530
    assert auto.training.max_steps / auto.training.updates_per_generation == 80
    assert (auto.training.dynamic_sampling_oversample, auto.training.dynamic_sampling_skip) == ("auto", False)
    assert skip.training.dynamic_sampling_skip
    assert study.arms["skip"][: len(study.arms["auto"])] == study.arms["auto"]
    assert len(study.seeds) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "FIPO"], "--arms: there is no 'FIPO' in this study, only DAPO, FIPO [1.0, 1.2]"),
        (["--jobs", "0"], "--jobs=0 must be at least 1"),
        (["--summarise"], "No run of DAPO, with which all others are compared, is finished in "),
        (["--merge", "recipes/tiny/none.json"], "recipes/tiny/none.json cannot be read: "),
    ],
)
def test_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["replicate.py", "--study", "tiny", "--output_dir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stopped:
        replicate.main()
    assert message in stopped.value.code
    assert list(tmp_path.iterdir()) == []


def test_merging_is_not_running(monkeypatch, tmp_path, capsys):
    """All that is printed and written is made of results.json. What merging is: tests/analysis."""
    run = {"avg@32": 0.5, "updates": 240}
    arm = {"train": [], "recipe_sha256": "0123", "runs": {"1": run}, "curves": {"1": {"avg@32": {"0": 0.25}}}}
    part = {"study": "tiny", "versions": {}, "evaluate": [], "arms": {"DAPO": arm}}
    (tmp_path / "part.json").write_text(json.dumps(part))
    arguments = ["--study", "tiny", "--merge", str(tmp_path / "part.json"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["replicate.py", *arguments])
    replicate.main()
    assert "| avg@32, % | 50.0 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out/tiny").iterdir()} == {"results.json", "tables.md", "held_out.png"}


def test_failed_run_ends_the_study_with_its_output(tmp_path):
    arguments = {"train": ["--config", "recipes/tiny/none.yaml"], "evaluate": []}
    task = Task(tmp_path, tmp_path / "run", arguments, on_gpu=False)
    with pytest.raises(RuntimeError, match=r"train ended with exit status 1(.|\n)*none.yaml"):
        run_one(Commands(), task, problems=0)
