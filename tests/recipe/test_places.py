"""Files that a recipe names may lie beside it; what it sets in the environment is said, or refused."""

import logging
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from fipo_trl.commands.train import prepare
from fipo_trl.recipe.read import read
from fipo_trl.recipe.validate import read_and_validate


RECIPE = ROOT / "recipes/tiny/fipo.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe with its model, data and reward beside it; the working directory is elsewhere."""
    folder = tmp_path / "mine"
    shutil.copytree(ROOT / "recipes/tiny/base", folder / "base")
    shutil.copytree(ROOT / "recipes/tiny/data", folder / "data")
    (folder / "reward_beside_recipe.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(completion)) for completion in completions]\n"
    )
    text = RECIPE.read_text().replace("recipes/tiny/base", "base").replace("recipes/tiny/data", "data")
    text = text.replace("recipes.tiny.running_sums.exact_answer", "reward_beside_recipe.short")
    (folder / "recipe.yaml").write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.mark.slow
def test_model_data_and_reward_lie_beside_the_recipe(folder):
    written = read(["--config", "../mine/recipe.yaml"])
    assert written.recipe["model_name_or_path"] == "../mine/base"
    _, trainer, _ = prepare(["--config", "../mine/recipe.yaml", "--output_dir", "out"])
    assert trainer.reward_func_names == ["short"]
    assert len(trainer.train_dataset) == 2000


def test_the_working_directory_comes_first(folder):
    shutil.copytree(folder / "data", "data")
    assert read(["--config", "../mine/recipe.yaml"]).recipe["dataset_name"] == "data"


def test_problems_keep_their_names(folder):
    with (folder / "recipe.yaml").open("a") as file:
        file.write("eval_problems: [held_out=data, aime24]\neval_steps: 8\n")
    assert read(["--config", "../mine/recipe.yaml"]).recipe["eval_problems"] == ["held_out=../mine/data", "aime24"]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "DYLD_INSERT_LIBRARIES"])
def test_a_recipe_does_not_change_what_runs(folder, name):
    with (folder / "recipe.yaml").open("a") as file:
        file.write(f"env: {{{name}: x}}\n")
    with pytest.raises(ValueError, match=f"env sets {name}, which changes what program runs"):
        read(["--config", "../mine/recipe.yaml"])


def test_what_env_sets_is_said(folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="fipo_trl")
    monkeypatch.setenv("FIPO_TEST", "0")  # so that it is taken back
    with (folder / "recipe.yaml").open("a") as file:
        file.write("env: {FIPO_TEST: 1}\n")
    prepare(["--config", "../mine/recipe.yaml", "--output_dir", "out"])
    assert "../mine/recipe.yaml sets the environment variable FIPO_TEST=1." in caplog.messages


def test_a_value_of_the_wrong_type_names_its_file(folder):
    with (folder / "recipe.yaml").open("a") as file:
        file.write("num_train_epochs: many\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: argument --num_train_epochs.* invalid float value: 'many'"):
        read_and_validate(["--config", "../mine/recipe.yaml"])
    with pytest.raises(ValueError, match=r"^argument --learning_rate.* invalid float value: 'fast'"):
        read_and_validate(["--config", str(RECIPE), "--learning_rate", "fast"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Give a file with one row a line"),
        ('{"prompt": "a1="}\n{"prompt": \n', r"line 2 of .*rows\.jsonl is not valid JSON"),
        ('{"prompt": "a1="}\n3\n', r"line 2 of .*rows\.jsonl must hold one row"),
    ],
)
def test_a_broken_file_names_its_line(folder, content, message):
    Path("rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(["--config", "../mine/recipe.yaml", "--output_dir", "out", "--dataset_name", "rows.jsonl"])
