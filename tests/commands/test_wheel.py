"""What a user installs: a wheel, in an environment and a folder from which this clone is not seen."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from tiny import make_model
from transformers import AutoTokenizer


MAX_BYTES = 2_500_000  # two models of 600 kB and their data; no figures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a folder `build`, and puts into the next wheel what lies there."""
    source = tmp_path_factory.mktemp("source")
    for name in ("fipo_trl", "recipes", "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A venv with the wheel, and the packages of this one except where a .pth file leads, as to this clone."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    Path(own.stdout.strip(), "packages.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    installed = subprocess.run(
        [*command, "--ignore-installed", str(wheel)], capture_output=True, text=True, env=clean_environment()
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return folder / "bin"


def clean_environment():
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture
def fipo_trl(environment, tmp_path):
    """Runs `fipo-trl` in an empty folder, and expects an exit status. Returns what it printed, errors last."""

    def run(*arguments, status=0):
        command = [str(environment / "fipo-trl"), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_environment())
        assert run.returncode == status, f"{arguments}\n{run.stdout}\n{run.stderr}"
        return run.stdout + run.stderr

    return run


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes, {len(names)} files")
    of_package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fipo_trl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert of_package <= names
    # What recipes read, by its names in the clone; studies' results and pictures stay there
    files = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    shipped = {f"fipo_trl/recipe/{path.relative_to(ROOT).as_posix()}" for path in files}
    left_out = {name for name in shipped - names if not name.endswith((".png", ".pyc"))}
    of_studies = ("SmolLM2-135M/results.json", "tiny/study/results.json", "tiny/credit/credit_fidelity.json")
    of_studies += ("tiny/skip/results.json", "tiny/skip/data/train.jsonl", "tiny/skip/data/test.jsonl")
    of_studies += ("SmolLM2-135M/credit/credit_fidelity.json", "calibrated/credit/credit_fidelity.json")
    of_studies += ("tiny/skip/history.json", "calibrated/results.json", "calibrated/calibration.json")
    of_studies += ("calibrated/confirmation.json",)
    assert left_out == {f"fipo_trl/recipe/recipes/{name}" for name in of_studies}
    others = names - of_package - shipped
    assert {name.split("/")[0] for name in others} == {wheel.name.split("-py3")[0] + ".dist-info"}
    assert not [name for name in names if name.endswith((".png", ".pyc"))]
    assert size < MAX_BYTES


def test_the_clone_is_not_seen(environment, tmp_path):
    code = "import importlib.util as i, fipo_trl; print(fipo_trl.__file__, *map(i.find_spec, ('recipes', 'tests')))"
    run = subprocess.run(
        [environment / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean_environment()
    )
    place, *others = run.stdout.split()
    assert Path(place).is_relative_to(environment.parent), run.stderr
    assert others == ["None", "None"]


def test_a_users_first_hour(fipo_trl, tmp_path):
    assert fipo_trl("--version").strip() == "0.2.0"
    assert "tiny/fipo " in fipo_trl("recipes")
    assert "recipes/tiny/base/model.safetensors" in fipo_trl("recipes", "copy", "tiny/fipo")
    assert "Did you mean 'tiny/fipo'?" in fipo_trl("recipes", "copy", "tiny/fippo", status=1)
    recipe = "recipes/tiny/fipo.yaml"

    assert "128 completions" in fipo_trl("doctor", "--config", recipe)
    assert "Did you mean 'max_steps'?" in fipo_trl("train", "--config", recipe, "--max_step", 8, status=1)
    # The recipe's model, and one of the user's own
    make_model().save_pretrained(tmp_path / "mine")
    AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/base").save_pretrained(tmp_path / "mine")
    train = ["train", "--config", recipe, "--max_steps", 8, "--token_credit_every", 1]
    for seed, model in enumerate(("recipes/tiny/base", "mine")):
        output_dir = f"outputs/seed-{seed}"
        printed = fipo_trl(*train, "--model_name_or_path", model, "--seed", seed, "--output_dir", output_dir)
        assert f"Trained for 8 updates. The model is in {output_dir}." in printed

    few = tmp_path / "few.jsonl"
    few.write_text("".join((tmp_path / "recipes/tiny/data/test.jsonl").read_text().splitlines(True)[:2]))
    reward = ["--reward", "recipes.tiny.running_sums.exact_answer"]
    printed = fipo_trl(
        *("evaluate", "--model", "outputs/seed-0", "--dataset", "few.jsonl", *reward),
        *("--n", 2, "--max_tokens", 32, "--output_dir", "outputs/evaluation"),
    )
    assert "avg@2" in printed
    assert (tmp_path / "outputs/evaluation/few/summary.json").is_file()

    assert "outputs/report/report.html" in fipo_trl("report", "outputs/seed-0", "outputs/seed-1")
    assert Image.open(tmp_path / "outputs/report/influence.png").width > 500
    assert "outputs/seed-0/token_credit/" in fipo_trl("token-credit", "--run", "outputs/seed-0")
    assert len(list((tmp_path / "outputs/seed-0/token_credit").glob("*.html"))) == 1
    assert "reward, mean over training" in fipo_trl("compare", "A=outputs/seed-0", "B=outputs/seed-1")
