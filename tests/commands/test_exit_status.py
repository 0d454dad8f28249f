"""How a training ends, for who started it: the exit status of the real command, with vLLM's own engine and without."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from held import REWARD, HeldRun
from rewards_for_tests import COLLAPSE_FLAGS

from fipo_trl.trainer.resume import find_checkpoint


SCRIPT = [sys.executable, "scripts/train_fipo.py"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
COMMAND = [sys.executable, "-m", "fipo_trl", "train"]
TWO_PROCESSES = ["--accelerate_config", "two_cpu_processes", "--main_process_port", "0"]  # a free port
ON_TWO = ["--per_device_train_batch_size", "8", "--max_steps", "24"]
pytestmark = pytest.mark.slow
IF_INSTALLED = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def run(command, recipe, output_dir, *settings):
    """Run to the end. The output is stdout and stderr."""
    command = [*command, "--config", f"recipes/tiny/{recipe}.yaml", "--output_dir", str(output_dir)]
    return subprocess.run(
        [*command, *map(str, settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


@pytest.mark.vllm
@IF_INSTALLED
def test_0_at_the_end(tmp_path):
    """Of the training and of its launcher. (Without vLLM: tests/commands/test_train.py)"""
    ended = run([*ACCELERATE, "--cpu", SCRIPT[1]], "fipo_vllm", tmp_path, "--max_steps", 8)
    assert_trained(ended, tmp_path, updates=8)


def assert_trained(ended, output_dir, updates):
    assert ended.returncode == 0, ended.stdout
    assert f"Trained for {updates} updates. The model is in {output_dir}." in ended.stdout
    assert "Traceback" not in ended.stdout  # an engine that outlives its process group would leave one
    assert (output_dir / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("recipe", "door"),
    [("fipo", COMMAND), pytest.param("fipo_vllm", SCRIPT, marks=[pytest.mark.vllm, IF_INSTALLED])],
    ids=["fipo", "fipo_vllm"],
)
def test_130_after_a_signal_and_0_at_the_end_of_what_is_resumed(tmp_path, recipe, door):
    settings = [*REWARD, "--max_steps", "17"]
    resume = ["--resume_from_checkpoint", "latest"]
    command = [*COMMAND, "--config", f"recipes/tiny/{recipe}.yaml", "--output_dir", str(tmp_path / "out"), *settings]
    with HeldRun(command, tmp_path / "interrupted", generation=1) as held:
        held.signal(signal.SIGINT)
        assert held.let_go() == 130, held.log.read_text()
    assert_stopped(held, tmp_path / "out", update=1)
    # Updates 2 to 8 are of the generation that was saved
    with HeldRun([*command, *resume], tmp_path / "terminated", generation=1) as held:
        held.signal(signal.SIGTERM)
        assert held.let_go() == 130, held.log.read_text()
    assert_stopped(held, tmp_path / "out", update=9)
    assert_trained(run(door, recipe, tmp_path / "out", *settings, *resume), tmp_path / "out", updates=17)


def assert_stopped(held, output_dir, update):
    output = held.log.read_text()
    assert f"Stopped at update {update}, with a checkpoint in {output_dir}." in output
    assert "Traceback" not in output
    assert not (output_dir / "model.safetensors").exists()
    assert find_checkpoint(str(output_dir), "latest", 17) == str(output_dir / f"checkpoint-{update}")


@pytest.mark.vllm
@IF_INSTALLED
def test_3_after_a_collapse(tmp_path):
    """(Without vLLM: tests/commands/test_train.py)"""
    ended = run(COMMAND, "fipo_vllm", tmp_path, *COLLAPSE_FLAGS)
    assert ended.returncode == 3, ended.stdout
    stopped = int(re.search(r"Stopped at update (\d+) because on_collapse is 'stop'", ended.stdout)[1])
    state = json.loads((tmp_path / f"checkpoint-{stopped}" / "trainer_state.json").read_text())
    assert state["global_step"] == stopped < 200
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    [SCRIPT, COMMAND, [*COMMAND, *TWO_PROCESSES]],
    ids=["script", "fipo-trl", "fipo-trl on two processes"],
)
def test_1_and_one_line_for_what_is_refused(tmp_path, command):
    ended = run(command, "fipo", tmp_path, "--infuence_weight_min", 1)
    assert ended.returncode == 1
    message = "error: argument: nothing reads 'infuence_weight_min'. Did you mean 'influence_weight_min'?"
    assert ended.stdout.count(message) == 1
    assert ended.stdout.count("error:") == 1
    assert "Traceback" not in ended.stdout


def test_accelerate_prints_once_what_two_processes_refuse(tmp_path):
    config = ["--config_file", "recipes/accelerate/two_cpu_processes.yaml", "--main_process_port", "0"]
    ended = run([*ACCELERATE, *config, SCRIPT[1]], "fipo", tmp_path, "--infuence_weight_min", 1)
    assert ended.returncode != 0
    assert ended.stdout.count("error: argument: nothing reads 'infuence_weight_min'.") == 1


def test_two_processes_stop_when_the_command_alone_is_terminated_and_go_on(tmp_path):
    settings = [*TWO_PROCESSES, "--config", "recipes/tiny/fipo.yaml", *ON_TWO, *REWARD, "--output_dir"]
    settings += [str(tmp_path / "out")]
    with HeldRun([*COMMAND, *settings], tmp_path / "held", generation=2, processes=2) as held:
        held.signal(signal.SIGTERM, handled_by=2)
        assert held.let_go() == 130, held.log.read_text()
    assert f"Stopped at update 9, with a checkpoint in {tmp_path / 'out'}." in held.log.read_text()
    assert "Traceback" not in held.log.read_text()
    checkpoint = tmp_path / "out" / "checkpoint-9"
    assert {"generation_state_0.pt", "generation_state_1.pt", "trainer_state.json"} <= set(os.listdir(checkpoint))
    ended = subprocess.run(
        [*COMMAND, *settings, "--resume_from_checkpoint", "latest"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("Trained for 24 updates") == 1
    assert "Traceback" not in ended.stdout


def test_a_training_whose_launcher_is_gone_stops_with_a_checkpoint(tmp_path):
    """`accelerate launch` does not pass on a signal that it alone gets: the training would go on for good."""
    settings = ["--config", "recipes/tiny/fipo.yaml", *REWARD, "--max_steps", "320", "--output_dir"]
    command = [*ACCELERATE, "--cpu", SCRIPT[1], *settings, str(tmp_path / "out")]
    with HeldRun(command, tmp_path / "held", generation=2) as held:
        held.process.kill()
        assert held.let_go() == -signal.SIGKILL  # when the training has ended, too
    assert "The launcher is gone. Stopping, and saving a checkpoint" in held.log.read_text()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-9"]
