"""`fipo-trl compare` on finished runs and on recipes. tests/scripts/test_replicate.py stops one, and goes on."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from fipo_trl.commands import compare
from fipo_trl.recipe.read import OF_FIPO


TINY = "recipes/tiny/fipo.yaml --max_steps 8"
REWARD = ["--reward", "recipes.tiny.running_sums.exact_answer"]


def write_run(folder, rewards, place="."):
    rows = [
        {"step": step, "loss": 0.0, "reward": reward, "grad_norm": 0.5, "step_time": 2.0}
        for step, reward in enumerate(rewards, start=1)
    ]
    (folder / place).mkdir(parents=True)
    state = {"global_step": len(rows), "log_history": rows}
    (folder / place / "trainer_state.json").write_text(json.dumps(state))
    return folder


def stopped(arguments):
    with pytest.raises(SystemExit) as error:
        compare.main(list(map(str, arguments)))
    return error.value.code


def test_finished_runs_are_paired_by_seed(tmp_path, capsys):
    for seed, reward in ((10, 0.9), (2, 0.1), (3, 0.5)):
        write_run(tmp_path / f"dapo-seed{seed}", [reward] * 4)
        write_run(tmp_path / f"fipo-seed{seed}", [reward + 0.05] * 4)
    (tmp_path / "fipo-seed10.log").write_text("")
    out = tmp_path / "out"
    compare.main([f"DAPO={tmp_path}/dapo-seed*", f"FIPO={tmp_path}/fipo-seed*", "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert "| reward, mean over training, % | +5.0 [+5.0, +5.0] |" in printed
    assert "Seeds: 3. Cells are means over the seeds, with 95% intervals." in printed
    assert (out / "tables.md").read_text() in printed
    results = json.loads((out / "results.json").read_text())
    assert results["arms"]["FIPO"]["runs"]["10"]["reward"] == pytest.approx(0.95)
    assert results["arms"]["FIPO"]["folders"] == [f"{tmp_path}/fipo-seed{seed}" for seed in (2, 3, 10)]
    assert all(Image.open(out / name).width > 500 for name in ("curves.png", "differences.png"))
    assert (out / "report/report.html").exists()
    assert not list(out.rglob("arguments.json"))  # nothing ran


def test_fewer_than_three_seeds_have_no_interval(tmp_path, capsys):
    """Nor do runs whose names say no seed get one: they are paired in their order."""
    for name, reward in (("a1", 0.9), ("a2", 0.1), ("b1", 0.8), ("b2", 0.3)):
        write_run(tmp_path / name, [reward] * (4 if name == "a1" else 5))
    compare.main([f"A={tmp_path}/a*", f"B={tmp_path}/b*", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| reward, mean over training, % | 50.0 | 55.0 |" in printed
    assert "| reward, mean over training, % | +5.0 |" in printed
    assert "of fewer than 3 seeds an interval says nothing, so there is none" in printed
    assert "The runs have 4 to 5 updates: do not compare means over training." in printed
    assert "[" not in re.sub(r"\n\nNumbers, tables.*", "", printed)
    assert json.loads((tmp_path / "out/results.json").read_text())["arms"]["A"]["mean"]["reward"] == [0.5, None, None]


def test_arms_without_a_common_seed(tmp_path, capsys):
    write_run(tmp_path / "a-seed-1", [0.5] * 4)
    write_run(tmp_path / "b-seed-2", [0.5] * 4)
    compare.main([f"A={tmp_path}/a-*", str(tmp_path / "b-seed-2"), "--output_dir", str(tmp_path / "out")])
    assert "Difference" not in capsys.readouterr().out


@pytest.mark.slow
def test_recipes_are_trained_then_evaluated_then_compared(tmp_path, capsys):
    out, few = tmp_path / "out", tmp_path / "few.jsonl"
    few.write_text("".join(Path("recipes/tiny/data/test.jsonl").read_text().splitlines(True)[:2]))
    command = [f"DAPO={TINY} --trainer dapo", f"FIPO={TINY}", "--seeds", "5", "--jobs", "2", "--output_dir", str(out)]
    compare.main(command)
    assert "reward, mean over training" in capsys.readouterr().out
    states = sorted(out.rglob("run/trainer_state.json"))
    assert [path.relative_to(out).parts[:2] for path in states] == [("DAPO", "seed-5"), ("FIPO", "seed-5")]
    made = [path.stat().st_mtime_ns for path in states]

    # The same with problems: training is passed over
    evaluation = ["--dataset", str(few), *REWARD, "--n", "4", "--max_tokens", "32"]
    compare.main([*command, *evaluation])
    printed = capsys.readouterr().out
    assert "| avg@4, % |" in printed
    assert "one chain, %" in printed
    assert [path.stat().st_mtime_ns for path in states] == made
    results = json.loads((out / "results.json").read_text())["arms"]
    assert results["DAPO"]["train"][-2:] == ["--trainer", "dapo"]

    # As a finished run, it answers as it did
    finished = [f"F={out}/FIPO/seed-*/run", "--output_dir", str(tmp_path / "finished"), *evaluation]
    compare.main(finished)
    (mean,) = json.loads((tmp_path / "finished/results.json").read_text())["arms"]["F"]["runs"].values()
    assert mean["avg@4"] == results["FIPO"]["runs"]["5"]["avg@4"]
    assert mean["reward"] == results["FIPO"]["runs"]["5"]["reward"]

    # Other samples, another recipe: not in this folder
    assert "holds a run of other arguments" in stopped([*command, *evaluation[:-1], "16"])
    assert "holds a run of other arguments" in stopped(
        [*command[:1], command[1] + " --learning_rate 1e-3", *command[2:]]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A=nowhere*"], "'A=nowhere.' names nothing that exists"),
        (["A=recipes/tiny/none.yaml"], "--config recipes/tiny/none.yaml: there is no such file"),
        (["recipes/tiny/fipo.yaml"], "is an arm without a name. Write it as NAME=recipes/tiny/fipo.yaml"),
        ([f"A={TINY} --seed 3"], "The arm 'A' sets --seed, which is another for each of its runs"),
        ([f"A={TINY} --max_step 3"], "Did you mean 'max_steps'?"),
        ([f"A={TINY} --trainer 'dapo"], "No closing quotation"),
        ([f"A={TINY}", f"A={TINY}"], "a second arm A"),
        ([f"A 1={TINY}", f"A-1={TINY}"], "The arm 'A-1' would lie in .*, as the arm 'A 1' does"),
        ([f"report={TINY}"], "as its report does. Rename the arm"),
        ([f"[]={TINY}"], "as the study does. Rename the arm"),
        ([f"A={TINY} --trainer dapo --{min(OF_FIPO)} 1"], "is a setting of FIPO"),
        ([f"A={TINY}", "--n", "4"], "--n does nothing without --dataset"),
        ([f"A={TINY}", "--dataset", "nowhere"], "--dataset: cannot load 'nowhere'"),
        ([f"A={TINY}", "--dataset", "recipes/tiny/data", "--reward", "none"], "--reward: cannot load 'none'"),
        ([f"A={TINY}", "--jobs", "0"], "--jobs=0 must be at least 1"),
        (["A={tmp}/x-seed1", "--seeds", "1"], "--seeds does nothing: no arm is a recipe"),
        (["A={tmp}/unfinished"], "unfinished is not finished: only its checkpoints have a trainer_state.json"),
        (["A={tmp}/?-seed1"], "names two runs of one seed"),
    ],
)
def test_refused_before_anything_runs(tmp_path, arguments, message):
    for name in ("x-seed1", "y-seed1"):
        write_run(tmp_path / name, [0.5])
    write_run(tmp_path / "unfinished", [0.5], place="checkpoint-1")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    status = stopped([*arguments, "--output_dir", tmp_path / "out"])
    assert re.search(message, status)
    assert not (tmp_path / "out").exists()


def test_help_has_examples(capsys):
    assert stopped(["--help"]) == 0
    assert "fipo-trl compare 'DAPO=outputs/dapo-seed*' 'FIPO=outputs/fipo-seed*'" in capsys.readouterr().out
