"""A recipe is read and validated without a trainer; each arm reads its own settings."""

import logging
import subprocess
import sys

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


@pytest.mark.parametrize("name", sorted(OF_FIPO))
def test_a_flag_of_fipo_is_an_error_for_dapo(name):
    with pytest.raises(ValueError, match=f"argument: '{name}' is a setting of FIPO, and trainer=dapo does not read"):
        read(["--config", RECIPE, "--trainer", "dapo", f"--{name}", "10"])


def test_a_setting_of_fipo_in_a_recipe_of_dapo_is_an_error(tmp_path):
    recipe = tmp_path / "dapo.yaml"
    recipe.write_text("trainer: dapo\noutput_dir: out\nuse_cpu: true\nbf16: false\n")
    assert read(["--config", str(recipe)]).trainer == "dapo"
    recipe.write_text(recipe.read_text() + "token_credit_every: 10\n")
    with pytest.raises(ValueError, match=r"dapo\.yaml: 'token_credit_every' is a setting of FIPO"):
        read(["--config", str(recipe)])


def test_dapo_may_make_one_update_per_generation():
    flags = ["--trainer", "dapo", "--gradient_accumulation_steps", "8"]
    assert read_and_validate(["--config", RECIPE, *flags]).training.updates_per_generation == 1


def test_grpo_is_gone():
    with pytest.raises(ValueError, match="invalid choice: 'grpo'"):
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
