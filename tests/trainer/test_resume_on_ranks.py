"""A run on several processes that is killed and resumed is the run that was not: DDP, FSDP2, ZeRO-3."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_ranks import DDP, FSDP2, FSDP2_SHARDED, ZERO3
from held import REWARD, HeldRun
from safetensors.torch import load_file
from tiny import distance, make_model
from transformers import AutoModelForCausalLM

from fipo_trl.trainer.manifest import faults, read_manifest
from fipo_trl.trainer.resume import latest_checkpoint


pytestmark = pytest.mark.slow
# Completions are sampled, so that the states of the random numbers matter. Update 5 is in the middle of a generation
SETTINGS = {
    "sampled": True,
    "per_device_train_batch_size": 8,  # of all processes
    "steps_per_generation": 3,
    "max_completion_length": 8,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 5,
}


@pytest.mark.parametrize(
    ("launch", "settings", "of_second_rank"),
    [
        (DDP, {}, "generation_state_1.pt"),
        (FSDP2, {}, "rng_state_1.pth"),
        (FSDP2, {"lora": True}, "rng_state_1.pth"),
        (FSDP2_SHARDED, {}, "pytorch_model_fsdp_0/__1_0.distcp"),
        (ZERO3, {}, "global_step5/zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
    ids=["DDP", "FSDP2", "FSDP2, LoRA", "FSDP2, sharded", "ZeRO-3"],
)
def test_killed_after_a_save_and_resumed(ranks, tmp_path, launch, settings, of_second_rank):
    settings = SETTINGS | settings
    whole = ranks.run("train_on_ranks:cases", tmp_path, {"whole": settings}, launch=launch)
    killed = settings | {"die_after": 5}
    ranks.run("train_on_ranks:cases", tmp_path, {"killed": killed}, launch=launch, fails=True)
    (checkpoint,) = (tmp_path / "killed").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"
    resumed = ranks.run("train_on_ranks:cases", tmp_path, {"killed": settings | {"resume": True}}, launch=launch)
    for before, after in zip(whole, resumed, strict=True):
        before, after = before["whole"], after["killed"]
        assert after["held"] == before["held"]
        assert rows(after["log"]) == rows(before["log"])
        assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
    assert [row["step"] for row in rows(whole[0]["whole"]["log"])] == list(range(1, 9))

    # What the checkpoint says of itself
    assert faults(checkpoint) == {}
    files = read_manifest(checkpoint)["files"]
    assert of_second_rank in files
    assert files == {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "checkpoint.json"
    }
    os.truncate(checkpoint / of_second_rank, files[of_second_rank] // 2)
    assert of_second_rank in faults(checkpoint)
    assert latest_checkpoint(tmp_path / "killed").name == "checkpoint-8"


def rows(log):
    """Of the updates, but for what they took."""
    return [{name: value for name, value in row.items() if name != "step_time"} for row in log if "loss" in row]


# On another number of processes, or saved by others


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Runs of two processes up to update 5, and the weights that their checkpoints hold, by who saved them."""
    folder, weights = tmp_path_factory.mktemp("saved"), {}
    for name, launch in {"DDP": DDP, "FSDP2": FSDP2, "sharded": FSDP2_SHARDED, "ZeRO-3": ZERO3}.items():
        two = ranks.run("train_on_ranks:cases", folder, {name: SETTINGS | {"max_steps": 5}}, launch=launch)
        weights[name] = two[0][name]["weights"]
    return folder, weights


@pytest.mark.parametrize(
    ("name", "launch"),
    [("DDP", DDP), ("FSDP2", FSDP2), ("sharded", FSDP2_SHARDED)],
    ids=["DDP", "FSDP2", "FSDP2, sharded"],
)
def test_more_processes_go_on_with_a_new_generation(ranks, saved, name, launch):
    """With a learning rate of 0, an update leaves the weights where they were."""
    folder, weights = saved
    settings = SETTINGS | {"resume": True, "max_steps": 6, "learning_rate": 0.0, "save_strategy": "no"}
    four = ranks.run("train_on_ranks:cases", folder, {name: settings}, launch=launch, processes=4)
    assert [each[name]["world_size"] for each in four] == [4] * 4
    assert [row["step"] for row in rows(four[0][name]["log"])] == [1, 2, 3, 4, 5, 6]
    assert all(distance(each[name]["weights"], weights[name]) == 0 for each in four)
    assert distance(weights[name], dict(make_model().named_parameters())) > 0
    said = ranks.printed()
    assert "checkpoint-5 holds no generation state for these processes and batch layout" in said
    assert "world_size: 2 -> 4" in said


def test_deepspeed_applies_another_learning_rate(ranks, saved):
    folder, weights = saved
    settings = SETTINGS | {"resume": True, "max_steps": 6, "learning_rate": 0.0, "save_strategy": "no"}
    two = ranks.run("train_on_ranks:cases", folder, {"ZeRO-3": settings}, launch=ZERO3)
    assert rows(two[0]["ZeRO-3"]["log"])[-1]["step"] == 6
    assert all(distance(each["ZeRO-3"]["weights"], weights["ZeRO-3"]) == 0 for each in two)


def test_sharded_weights_can_be_merged(ranks, saved, tmp_path):
    """As the README of the package says."""
    folder, weights = saved
    checkpoint = folder / "sharded" / "checkpoint-5"
    ranks.run("train_on_ranks:merge", checkpoint / "pytorch_model_fsdp_0", tmp_path, processes=1)
    make_model().config.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(dict(merged.named_parameters()), weights["sharded"]) == 0


def test_checkpoints_of_others_are_refused(ranks, saved):
    folder, _ = saved
    who = {
        "DDP": "processes that hold the whole model",
        "FSDP2": "FSDP2 with FULL_STATE_DICT",
        "sharded": "FSDP2 with SHARDED_STATE_DICT",
        "ZeRO-3": "DeepSpeed's ZeRO-3",
    }
    for me, launch in {"FSDP2": FSDP2, "ZeRO-3": ZERO3}.items():
        cases = {name: SETTINGS | {"resume": True} for name in who if name != me}
        both = ranks.run("train_on_ranks:refusals", folder, cases, launch=launch)
        assert both[0] == both[1]
        assert both[0].keys() == cases.keys()
        for name, said in both[0].items():
            assert said.endswith(f"checkpoint-5. It was saved by {who[name]}, not by {who[me]}.")


def test_more_processes_are_refused_by_deepspeed(ranks, saved):
    cases = {"ZeRO-3": SETTINGS | {"resume": True}}
    said, *_ = ranks.run("train_on_ranks:refusals", saved[0], cases, launch=ZERO3, processes=4)
    assert said["ZeRO-3"].endswith(
        "It was saved by 2 processes, whose shards DeepSpeed cannot give to 4. Start as many as then."
    )


# The command itself


def test_command_under_zero3_ends_with_a_whole_model(ranks, tmp_path):
    """Where its checkpoints have shards only."""
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--per_device_train_batch_size", "8", "--max_steps", "8"]
    arguments += ["--save_steps", "8", "--max_completion_length", "16", "--output_dir", str(tmp_path)]
    launch = (*ZERO3, "--zero3_save_16bit_model", "false")
    ended = ranks.run("train_on_ranks:command", arguments, launch=launch)
    assert [each["status"] for each in ended] == [0, 0]
    assert not (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained("recipes/tiny/base")
    assert 0 < distance(dict(model.named_parameters()), dict(base.named_parameters())) < 0.5


def test_command_under_fsdp2_killed_and_resumed(ranks, tmp_path):
    """Through `accelerate launch`, with sharded checkpoints. The last save is a model that from_pretrained loads."""
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--per_device_train_batch_size", "8", *REWARD]
    arguments += ["--max_steps", "12", "--save_steps", "8", "--output_dir"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *FSDP2_SHARDED, "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "tests/cpu_ranks.py", "scripts/train_fipo.py", *arguments]
    with HeldRun([*command, str(tmp_path / "killed")], tmp_path / "held", generation=2, processes=2):
        pass  # kill -9: after the save of update 8, and before the next one
    assert faults(tmp_path / "killed" / "checkpoint-8") == {}
    resumed = [*command, str(tmp_path / "killed"), "--resume_from_checkpoint", "latest"]
    run = subprocess.run(resumed, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    whole = ranks.run("train_on_ranks:command", [*arguments, str(tmp_path / "whole")], launch=FSDP2_SHARDED)
    assert [each["status"] for each in whole] == [0, 0]
    assert whole[0]["held"]["engine"] == "FSDP"
    mine, theirs = (load_file(Path(tmp_path, name, "model.safetensors")) for name in ("whole", "killed"))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "killed")
    base = AutoModelForCausalLM.from_pretrained("recipes/tiny/base")
    assert distance(dict(model.named_parameters()), mine) == 0
    assert distance(dict(base.named_parameters()), mine) > 0
