"""What fails leaves a checkpoint of its last update, from which the run goes on to the same weights."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import hanging_rewards
import pytest
import torch
from conftest import ROOT
from held import PATIENCE
from safetensors.torch import load_file
from tiny import PROMPTS, logged, make_trainer, parameters, right_for_some
from transformers import TrainerCallback

from fipo_trl import DAPOTrainer


RECIPE = "recipes/tiny/fipo.yaml"
# 8 updates a generation: the failures come in update 9 of 16
SETTINGS = ["--max_steps", "16", "--save_steps", "500", "--logging_steps", "1"]


def command(output_dir, reward, *arguments, processes=1):
    launcher = [sys.executable, "-c", "from fipo_trl.commands import main; main()", "train"]
    if processes > 1:
        launcher += ["--accelerate_config", "two_cpu_processes", "--main_process_port", "0"]
    reward = f"hanging_rewards.{reward}"
    launcher += ["--config", RECIPE, "--reward_funcs", reward, "--output_dir", str(output_dir)]
    return [*launcher, *SETTINGS, *arguments]


def launch(folder, *arguments, processes=1):
    environment = os.environ | {hanging_rewards.FOLDER: str(folder)}
    line = command(*arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """How many processes -> the folder of a run of theirs that nothing ended, made once. All rewards give the same."""

    @functools.cache
    def run(processes):
        folder = tmp_path_factory.mktemp("whole") / "out"
        ended = launch(folder, folder, "length", "--save_steps", "8", processes=processes)
        assert ended.returncode == 0, ended.stderr
        return folder

    return run


def assert_resumes(folder, reward, output_dir, whole, processes=1):
    """To the weights, and to the metrics, of a run that nothing ended.

    Of two processes the checkpoint is that of such a run, to the byte: transformers cannot load an optimizer on
    several processes without a GPU.
    """
    if processes > 1:
        names = ["model.safetensors", "optimizer.pt", "scheduler.pt"]
        names += [name for rank in (0, 1) for name in (f"rng_state_{rank}.pth", f"generation_state_{rank}.pt")]
        for name in names:
            expected = (whole(processes) / "checkpoint-8" / name).read_bytes()
            assert (output_dir / "checkpoint-8" / name).read_bytes() == expected, name
        return
    resumed = launch(folder, output_dir, reward, "--resume_from_checkpoint", "latest", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load_file(each / "model.safetensors") for each in (whole(processes), output_dir))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows, expected = (
        [
            [row[name] for name in ("reward", "num_tokens", "entropy") if name in row]
            for row in json.loads((each / "trainer_state.json").read_text())["log_history"]
        ]
        for each in (output_dir, whole(processes))
    )
    assert rows == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "processes"), [("fails_once", 1), ("fails_once_on_one_process", 2)], ids=["one process", "two"]
)
def test_an_exception_saves_a_checkpoint_that_resumes_exactly(tmp_path, whole, reward, processes):
    (tmp_path / "down").touch()
    failed = launch(tmp_path, tmp_path / "out", reward, processes=processes)
    assert failed.returncode == 1, failed.stderr
    said = f"after update 8. The checkpoint of that update is {tmp_path / 'out' / 'checkpoint-8'}"
    assert said in failed.stderr
    assert "--resume_from_checkpoint latest" in failed.stderr
    assert "ConnectionError: the sandbox is gone" in failed.stderr
    if processes == 1:  # two write as they come
        assert failed.stderr.index(said) < failed.stderr.index("ConnectionError: the sandbox is gone")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (tmp_path / "down").exists()
    assert_resumes(tmp_path, reward, tmp_path / "out", whole, processes)


def wait_for(condition, process, log):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "processes"),
    [("hangs_once", 1), ("hangs_once_async", 1), ("hangs_once", 2)],
    ids=["one process", "asynchronous", "two"],
)
def test_a_second_signal_in_a_reward_saves_a_checkpoint(tmp_path, whole, reward, processes):
    (tmp_path / "hang").touch()
    environment = os.environ | {hanging_rewards.FOLDER: str(tmp_path)}
    log = tmp_path / "log"
    with log.open("w") as output:
        line = command(tmp_path / "out", reward, processes=processes)
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        wait_for((tmp_path / "hangs").exists, process, log)
        if processes > 1:
            wait_for((tmp_path / "hangs_not").exists, process, log)
            time.sleep(1)  # from its reward to where it waits for the other
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: f"in reward {reward} since" in log.read_text(), process, log)
        time.sleep(1.5)  # on several processes, two signals within a second are one
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 130, log.read_text()
    assert f"The checkpoint of that update is {tmp_path / 'out' / 'checkpoint-8'}" in log.read_text()
    assert_resumes(tmp_path, reward, tmp_path / "out", whole, processes)


# In a trainer


class Down(Exception):
    """A service went down."""


class FailAt(TrainerCallback):
    """Fails at the nth time that something happens."""

    def __init__(self, event, number):
        setattr(self, event, self.fail)
        self.number = number

    def fail(self, *args, **kwargs):
        self.number -= 1
        if self.number == 0:
            raise Down


def down_after_update_6(trainer_state, **kwargs):
    if trainer_state.global_step > 6:
        raise Down
    return right_for_some(**kwargs)


KINDS = {
    "plain": {"gradient_accumulation_steps": 2},
    "iterations": {"gradient_accumulation_steps": 2, "num_iterations": 2, "temperature": 0.7},
    "spans": {"gradient_accumulation_steps": 3, "steps_per_generation": 8},  # updates that span two generations
    "dynamic sampling": {
        "gradient_accumulation_steps": 2,
        "dynamic_sampling": True,
        "dynamic_sampling_carry_over": True,
    },
    "an epoch is one generation": {
        "gradient_accumulation_steps": 2,
        "prompts": PROMPTS[:16],
        "trainer_class": DAPOTrainer,
    },
}
SAVED = {"save_strategy": "steps", "save_steps": 500, "max_steps": 20, "logging_steps": 4}


@pytest.fixture(scope="module")
def never_failed(tmp_path_factory):
    """A key of `KINDS` -> a trainer that has trained so, made once."""

    @functools.cache
    def train(name):
        folder = tmp_path_factory.mktemp("whole")
        trainer = make_trainer(folder, keywords={"reward_funcs": right_for_some}, **KINDS[name], **SAVED)
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize(
    ("failure", "update"),
    [
        (lambda: {"reward_funcs": down_after_update_6}, None),
        (lambda: {"callbacks": [FailAt("on_substep_end", 11)]}, None),  # between two micro-steps of an update
        (lambda: {"callbacks": [FailAt("on_step_end", 11)]}, 11),  # the update is made
        (lambda: {"callbacks": [FailAt("on_log", 2)]}, 8),
    ],
    ids=["reward", "accumulation", "end of an update", "log"],
)
@pytest.mark.parametrize("name", KINDS)
def test_failed_and_resumed_equals_uninterrupted(tmp_path, never_failed, name, failure, update):
    settings = KINDS[name] | SAVED
    whole = never_failed(name)
    reward = {"reward_funcs": right_for_some}
    failed = make_trainer(tmp_path / "failed", keywords=reward | failure(), **settings)
    with pytest.raises(Down):
        failed.train()
    assert 0 < failed.state.global_step < 20
    (checkpoint,) = (tmp_path / "failed").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{update or failed.state.global_step}"
    resumed = make_trainer(tmp_path / "failed", keywords=reward, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    for name in ("reward", "entropy", "num_tokens", "fipo/future_kl", "completions/q75_length"):
        assert logged(resumed, name) == logged(whole, name)
    expected = parameters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed).items())


def test_weights_between_two_updates_are_not_saved(tmp_path, caplog):
    trainer = make_trainer(tmp_path, keywords={"callbacks": [FailAt("on_optimizer_step", 3)]}, **SAVED)
    with pytest.raises(Down):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "it failed within the optimizer's step" in caplog.text


def test_what_failed_in_saving_is_not_saved(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, **SAVED | {"save_steps": 3})
    tries = []

    def full(*args, **kwargs):
        tries.append(trainer.state.global_step)
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert tries == [3]
    assert "checkpoint of that update" not in caplog.text


def test_a_disk_that_is_full_does_not_hide_what_failed(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, keywords={"callbacks": [FailAt("on_step_begin", 3)]}, **SAVED)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(Down):
        trainer.train()
    assert "No checkpoint was saved of update 2: OSError('No space left on device')" in caplog.text


def test_who_saves_nothing_saves_nothing(tmp_path, caplog):
    trainer = make_trainer(tmp_path, keywords={"callbacks": [FailAt("on_step_begin", 3)]}, save_strategy="no")
    with pytest.raises(Down):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "No checkpoint was saved of it: save_strategy is 'no'." in caplog.text


def test_a_checkpoint_that_is_there_is_not_saved_again(tmp_path, caplog):
    fail = {"callbacks": [FailAt("on_step_begin", 4)]}
    trainer = make_trainer(tmp_path, keywords=fail, **SAVED | {"save_steps": 3})
    saves = []
    monkeypatched = trainer._save_optimizer_and_scheduler
    trainer._save_optimizer_and_scheduler = lambda folder: (saves.append(folder), monkeypatched(folder))
    with pytest.raises(Down):
        trainer.train()
    assert len(saves) == 1
    assert f"The checkpoint of that update is {tmp_path / 'checkpoint-3'}" in caplog.text
