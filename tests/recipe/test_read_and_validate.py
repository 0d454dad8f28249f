"""A recipe is read and validated without a trainer; each arm reads its own settings."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fipo_trl import DAPOConfig, FIPOConfig
from fipo_trl.commands.train import prepare
from fipo_trl.recipe.read import OF_FIPO, read
from fipo_trl.recipe.validate import read_and_validate, validate


RECIPE = "recipes/tiny/fipo.yaml"


def test_each_arm_has_its_own_configuration():
    assert type(read_and_validate(["--config", RECIPE]).training) is FIPOConfig
    assert type(read_and_validate(["--config", RECIPE, "--trainer", "dapo"]).training) is DAPOConfig


def test_a_shared_recipe_says_once_what_dapo_ignores(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fipo_trl")
    arguments = ["--config", RECIPE, "--trainer=dapo", "--output_dir", str(tmp_path)]
    written = read(arguments)
    shared = ("future_kl_half_life", "influence_safety_ratio", "influence_weight_max", "influence_weight_min")
    assert written.ignored == shared
    prepare(arguments)
    messages = [record.message for record in caplog.records if "does not read" in record.message]
    assert messages == [f"trainer=dapo does not read these settings of FIPO in {RECIPE}: {', '.join(shared)}."]


@pytest.mark.parametrize("value", ["long", "[8, 32]", "null"])
def test_a_slip_in_a_setting_that_dapo_ignores_is_told(tmp_path, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub("(?m)^future_kl_half_life.*$", f"future_kl_half_life: {value}", Path(RECIPE).read_text()))
    with pytest.raises(ValueError, match="future_kl_half_life"):
        read(["--config", str(recipe), "--trainer", "dapo"])


@pytest.mark.parametrize("name", sorted(OF_FIPO))
def test_a_flag_of_fipo_is_an_error_for_dapo(name):
    with pytest.raises(ValueError, match=f"argument: '{name}' is a setting of FIPO, and trainer=dapo does not read"):
        read(["--config", RECIPE, "--trainer", "dapo", f"--{name}", "10"])


def test_a_setting_of_fipo_in_a_recipe_of_dapo_is_an_error(tmp_path):
    recipe = tmp_path / "dapo.yaml"
    recipe.write_text("trainer: dapo\noutput_dir: out\nuse_cpu: true\nbf16: false\n")
    assert read(["--config", str(recipe)]).config_class is DAPOConfig
    recipe.write_text(recipe.read_text() + "token_credit_every: 10\n")
    with pytest.raises(ValueError, match=r"dapo\.yaml: 'token_credit_every' is a setting of FIPO"):
        read(["--config", str(recipe)])


def test_dapo_may_make_one_update_per_generation():
    flags = ["--trainer", "dapo", "--gradient_accumulation_steps", "8"]
    assert read_and_validate(["--config", RECIPE, *flags]).training.updates_per_generation == 1


OWN_TRAINERS = """
from dataclasses import dataclass

from fipo_trl import DAPOConfig, DAPOTrainer, FIPOTrainer


class OfFIPO(FIPOTrainer):
    pass


class OfDAPO(DAPOTrainer):
    pass


@dataclass
class OwnConfig(DAPOConfig):
    own_setting: float = 1.0


class WithSetting(DAPOTrainer):
    _config_class = OwnConfig


def not_a_class():
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recipe, with a module of trainers beside it. It is named as no other test names one: modules stay imported."""
    (tmp_path / "own_trainers.py").write_text(OWN_TRAINERS)
    (tmp_path / "recipe.yaml").write_text(Path(RECIPE).read_text())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_trainers", raising=False)
    return ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(("name", "config_class"), [("OfFIPO", FIPOConfig), ("OfDAPO", DAPOConfig)])
def test_a_trainer_of_ones_own_reads_the_settings_of_its_class(own, caplog, name, config_class):
    caplog.set_level(logging.INFO, logger="fipo_trl")
    recipe, trainer, _ = prepare([*own, "--trainer", f"own_trainers.{name}"])
    assert type(recipe.training) is config_class
    assert type(trainer).__name__ == name
    told = "trainer=own_trainers.OfDAPO does not read these settings of FIPO" in caplog.text
    assert told == (name == "OfDAPO") == bool(recipe.ignored)
    if name == "OfDAPO":
        with pytest.raises(ValueError, match=r"setting of FIPO, and trainer=own_trainers[.]OfDAPO does not read"):
            read([*own, "--trainer", "own_trainers.OfDAPO", "--future_kl_half_life", "10"])


def test_a_trainer_of_ones_own_in_a_recipe_has_settings_of_its_own(own, tmp_path):
    text = re.sub("(?m)^(future_kl|influence).*$", "", Path(RECIPE).read_text())
    (tmp_path / "recipe.yaml").write_text(f"{text}\ntrainer: own_trainers.WithSetting\nown_setting: 2\n")
    assert read_and_validate(own).training.own_setting == 2.0
    assert read_and_validate([*own, "--own_setting", "3"]).training.own_setting == 3.0
    with pytest.raises(ValueError, match=r"recipe\.yaml: nothing reads 'own_setting'"):
        read([*own, "--trainer", "own_trainers.OfDAPO"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_trainers.Missing", "trainer: cannot load 'own_trainers.Missing' .*my_module.MyTrainer"),
        ("no_such_module.Trainer", "trainer: cannot load 'no_such_module.Trainer' "),
        ("own_trainers.not_a_class", "'own_trainers.not_a_class' is not a subclass of fipo_trl.DAPOTrainer"),
        ("trl.GRPOTrainer", "'trl.GRPOTrainer' is not a subclass of fipo_trl.DAPOTrainer. Derive it from that"),
    ],
)
def test_what_is_no_trainer(own, name, message):
    with pytest.raises(ValueError, match=message):
        read([*own, "--trainer", name])


def test_grpo_is_gone():
    with pytest.raises(ValueError, match=r"'trainer' must be one of fipo, dapo, or .*, got grpo\."):
        read(["--config", RECIPE, "--trainer", "grpo"])


def test_nothing_is_mutated():
    written = read(["--config", RECIPE, "--generation_batch_size", "64"])
    before = dict(written.recipe)
    first, second = validate(written), validate(written)
    assert written.recipe == before
    assert first.training.to_dict() == second.training.to_dict()


def test_the_number_of_processes_is_a_parameter():
    one, eight = (read_and_validate(["--config", RECIPE], world_size=n).training for n in (1, 8))
    assert eight.generation_batch_size == 8 * one.generation_batch_size
    assert (one.world_size, eight.world_size) == (1, 8)


def test_mistakes_are_told_before_trainers_and_vllm_are_imported():
    code = """
import atexit, sys
heavy = {"vllm", "trl.trainer.grpo_trainer"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules))))
from fipo_trl.commands import main
main(["train", "--config", "recipes/tiny/fipo_vllm.yaml", "--delta", "1.0"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("error: delta=1.0 must be greater than 1 + epsilon_high")
    assert run.stderr.count("\n") == 1
    assert run.stdout == "[]\n"
