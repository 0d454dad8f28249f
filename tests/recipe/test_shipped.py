"""The recipes that come with the package: listed, and copied with what they name."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fipo_trl.commands import recipes as command
from fipo_trl.recipe.read import read
from fipo_trl.recipe.shipped import copy, files_of, folder, recipes


NAMES = sorted(
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    for path in ROOT.glob("recipes/*/*.yaml")
    if path.parent.name != "accelerate"
)


def test_in_a_clone_they_lie_beside_the_package():
    assert folder() == ROOT / "recipes"
    assert not (ROOT / "fipo_trl" / "recipe" / "recipes").exists()  # it would hide them, and double them in a wheel


def test_all_are_listed_with_a_sentence(capsys):
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for line, sentence in zip(lines, recipes().values(), strict=True):
        assert line.endswith(sentence)
        assert sentence.startswith(("FIPO ", "DAPO "))
        assert 30 < len(sentence) < 120


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_whole(tmp_path, monkeypatch, name):
    """What the recipe reads, and the files in its launch line, are in the copy, at the same relative paths."""
    monkeypatch.chdir(tmp_path)
    files = copy(name, Path("."))
    assert files[0] == Path("recipes", f"{name}.yaml")
    assert all(filecmp.cmp(file, ROOT / file, shallow=False) for file in files)
    written = read(["--config", str(files[0])]).recipe
    for setting in ("model_name_or_path", "dataset_name"):
        assert not written[setting].startswith("recipes/") or Path(written[setting]).is_dir()
    for line in files[0].read_text().split("\n\n")[0].splitlines():
        for word in (word.rstrip(".,:;()") for word in line.split()):
            assert not word.startswith("recipes/") or Path(word).exists(), line
    assert not list(tmp_path.rglob("*.png"))


def test_what_the_tiny_recipe_names():
    files = {path.as_posix() for path in files_of("tiny/fipo")}
    assert {"tiny/running_sums.py", "tiny/base/model.safetensors", "tiny/data/test.jsonl"} < files
    assert not any("study" in path for path in files)
    assert Path("accelerate/16_nodes_fsdp2.yaml") in files_of("recipes/Qwen2.5-32B/fipo.yaml")


def test_a_file_that_differs_stays(tmp_path):
    (tmp_path / "recipes/tiny").mkdir(parents=True)
    mine = tmp_path / "recipes/tiny/running_sums.py"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"{mine} exists and differs"):
        copy("tiny/fipo", tmp_path)
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]  # nothing was copied
    mine.unlink()
    assert copy("tiny/fipo", tmp_path) == copy("tiny/fipo", tmp_path)  # what is equal may be copied again
    assert len(copy("tiny/fipo_lora", tmp_path)) > 5


def test_unknown_names_and_help():
    command_line = [sys.executable, "-m", "fipo_trl", "recipes"]
    run = subprocess.run([*command_line, "copy", "tiny/fippo"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert run.stderr.startswith("error: There is no recipe 'tiny/fippo'. Did you mean 'tiny/fipo'?")
    run = subprocess.run([*command_line, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0
    assert "fipo-trl recipes copy tiny/fipo" in run.stdout
