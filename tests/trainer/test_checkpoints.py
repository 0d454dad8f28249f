import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from tiny import PROMPTS, distance, logged, longer_is_better, make_trainer, parameters

from fipo_trl import DAPOTrainer
from fipo_trl.trainer.manifest import MANIFEST_NAME, faults, fingerprint, read_manifest, refuse_changes, run_of_trainer
from fipo_trl.trainer.resume import find_checkpoint, latest_checkpoint


TESTS = Path(__file__).parents[1]
SETTINGS = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5}
FILES = [
    "checkpoint.json",
    "config.json",
    "generation_config.json",
    "generation_state_0.pt",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
]
READ_ON_RESUMING = ["generation_state_0.pt", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 updates with checkpoints of updates 5, 10 and 12, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, **SETTINGS)
    trainer.train()
    return folder, parameters(trainer)


@pytest.fixture
def killed(run, tmp_path):
    """A copy of the run, as if it had ended with the save of update 10."""
    shutil.copytree(run[0], tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-12")
    return tmp_path / "killed"


def resume(folder, checkpoint=True, **settings):
    trainer = make_trainer(folder, **SETTINGS | settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def assert_same(run, trainer):
    assert trainer.state.global_step == 12
    assert all(torch.equal(value, run[1][name]) for name, value in parameters(trainer).items())


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


# Whole or not


def test_files_of_a_checkpoint(run):
    names = {path.name for path in (run[0] / "checkpoint-10").iterdir()}
    assert names == set(FILES)
    sizes = read_manifest(run[0] / "checkpoint-10")["files"]
    assert sizes == {name: (run[0] / "checkpoint-10" / name).stat().st_size for name in names - {MANIFEST_NAME}}
    assert faults(run[0] / "checkpoint-10") == {}


@pytest.mark.parametrize("damage", [cut_short, Path.unlink], ids=["cut short", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_is_not_whole_is_passed_over(killed, caplog, name, damage):
    last = killed / "checkpoint-10"
    damage(last / name)
    if name == MANIFEST_NAME and damage is Path.unlink:  # as if an older version had saved it
        assert find_checkpoint(str(killed), "latest", 12) == str(last)
        assert f"{last} has no checkpoint.json" in caplog.text
        return
    assert find_checkpoint(str(killed), "latest", 12) == str(killed / "checkpoint-5")
    assert f"{last} is passed over, it is not whole: {name} " in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-10 is not whole: {name} "):
        find_checkpoint(str(killed), str(last), 12)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_training_goes_on_from_the_whole_one_to_the_same_weights(run, killed, name):
    cut_short(killed / "checkpoint-10" / name)
    assert_same(run, resume(killed))


def test_a_trainer_refuses_a_broken_checkpoint_that_is_named(killed):
    (killed / "checkpoint-10" / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-10 is not whole: rng_state\.pth is missing"):
        resume(killed, str(killed / "checkpoint-10"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["optimizer.pt", "rng_state.pth", MANIFEST_NAME])
def test_killed_in_the_middle_of_a_save(run, tmp_path, part):
    command = [sys.executable, str(TESTS / "trainer" / "die_while_saving.py"), str(tmp_path), "10", part]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    process = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "checkpoint-10" / MANIFEST_NAME).exists() is False
    last = 10 if part == MANIFEST_NAME else 5  # all but the manifest was there
    assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{last}"
    assert_same(run, resume(tmp_path))
    assert faults(tmp_path / "checkpoint-10") == {}


@pytest.mark.parametrize("name", ["trainer_state.json", *READ_ON_RESUMING])
def test_checkpoints_without_a_manifest(run, killed, caplog, name):
    last = killed / "checkpoint-10"
    (last / MANIFEST_NAME).unlink()
    assert find_checkpoint(str(killed), str(last), 12) == str(last)
    assert "has no checkpoint.json: TRL saved it, or an older version" in caplog.text
    if name == "trainer_state.json":
        assert_same(run, resume(killed))
        shutil.rmtree(killed / "checkpoint-12")
        (last / MANIFEST_NAME).unlink(missing_ok=True)
    cut_short(last / name)
    assert latest_checkpoint(killed) == killed / "checkpoint-5"
    assert f"{name} is cut short or damaged" in caplog.text


def test_shards_and_folders(run, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(run[0] / "checkpoint-5", folder)
    (folder / MANIFEST_NAME).unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert faults(folder) == {"model-00002-of-00002.safetensors": "is missing"}

    (folder / "model.safetensors.index.json").unlink()  # FSDP with a sharded state
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"0" * 100)
    (folder / "optimizer.pt").unlink()
    assert faults(folder) == {}
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}))
    assert faults(folder) == {}
    cut_short(folder / "optimizer_0" / "__0_0.distcp")
    assert faults(folder) == {"optimizer_0/__0_0.distcp": "has 50 bytes of 100"}


def test_rotation_deletes_broken_ones_first(killed, caplog):
    os.utime(killed / "checkpoint-5", (1e9, 1e9))  # the oldest, which transformers would delete
    cut_short(killed / "checkpoint-10" / "optimizer.pt")
    os.utime(killed / "checkpoint-10", (1.1e9, 1.1e9))
    (killed / "checkpoint-11").mkdir()
    os.utime(killed / "checkpoint-11", (1.2e9, 1.2e9))
    resume(killed, save_steps=6, save_total_limit=2, max_steps=6)
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert "checkpoint-10 is deleted first, because it is not whole" in caplog.text


def test_a_save_leaves_nothing_of_what_was_in_its_folder(run, killed):
    last = killed / "checkpoint-10"
    cut_short(last / "optimizer.pt")
    (last / "rng_state_1.pth").write_text("of another process")
    resume(killed)
    assert not (last / "rng_state_1.pth").exists()
    assert faults(last) == {}


@pytest.mark.parametrize("broken", [False, True])
def test_latest_without_a_checkpoint_starts_anew(tmp_path, caplog, broken):
    if broken:
        (tmp_path / "checkpoint-5").mkdir()
    assert find_checkpoint(str(tmp_path), "latest", 12) is None
    assert ("holds no whole checkpoint" if broken else "holds no checkpoint") in caplog.text
    assert "the run starts anew" in caplog.text
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # as in transformers
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


# What resuming changes


def test_nothing_is_said_where_nothing_changes(run, killed, caplog):
    assert_same(run, resume(killed, save_steps=20, logging_steps=3, save_total_limit=4))
    assert "is not the one that saved" not in caplog.text
    longer = resume(killed, max_steps=13)  # a constant learning rate does not depend on it
    assert longer.state.global_step == 13
    assert "is not the one that saved" not in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_learning_rate_is_applied(tmp_path, caplog, optim):
    """The first update after resuming starts from the same weights and the same gradient."""
    settings = {"optim": optim, "weight_decay": 0.0, "max_grad_norm": 0.0}
    make_trainer(tmp_path, **SETTINGS | settings | {"max_steps": 5}).train()
    before = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    moved = {}
    for rate in (1e-2, 1e-3, 0.0):
        trainer = resume(tmp_path, str(tmp_path / "checkpoint-5"), max_steps=6, learning_rate=rate, **settings)
        moved[rate] = distance(parameters(trainer), before)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [rate] * 2
    assert moved[1e-2] > 0
    assert moved[1e-3] == pytest.approx(0.1 * moved[1e-2], rel=1e-3)
    assert moved[0.0] == 0
    assert "From here on: learning_rate: 0.01 -> 0.001." in caplog.text


def test_learning_rate_scales_a_schedule(tmp_path):
    settings = {"lr_scheduler_type": "linear", "max_steps": 10}
    make_trainer(tmp_path, **SETTINGS | settings).train()
    resumed = resume(tmp_path, str(tmp_path / "checkpoint-5"), learning_rate=1e-3, **settings)
    rates = logged(resumed, "learning_rate")
    assert rates == pytest.approx([(1e-2 if i < 5 else 1e-3) * (10 - i) / 10 for i in range(10)])


def test_other_changes_are_listed_in_one_warning(killed, caplog):
    keywords = {"reward_funcs": [longer_is_better, constant_reward]}
    trainer = resume(killed, seed=3, future_kl_half_life=8, weight_decay=0.5, keywords=keywords, prompts=PROMPTS[::-1])
    assert trainer.state.global_step == 12
    (message,) = [
        record.getMessage() for record in caplog.records if "is not the one that saved" in record.getMessage()
    ]
    for change in (
        "seed: 42 -> 3",
        "future_kl_half_life: 32.0 -> 8",
        "rewards: longer_is_better -> longer_is_better, constant_reward",
        "the training data are others, or in another order (100 rows -> 100 rows)",
        "The optimizer keeps what it had: weight_decay: 0.0 -> 0.5 is not applied.",
    ):
        assert change in message


def constant_reward(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer_class": DAPOTrainer}, "It was saved by FIPOTrainer, not by DAPOTrainer."),
        ({"optim": "sgd"}, "Its optimizer is adamw_torch_fused, not sgd."),
        ({"beta": 0.1}, "It stands inside a generation that was sampled with beta=0"),
    ],
)
def test_what_cannot_be_meant(killed, settings, message):
    with pytest.raises(ValueError, match=rf"cannot go on from .*checkpoint-10\. {message}"):
        resume(killed, **settings)
    if "beta" in settings:  # told by the generation itself
        (killed / "checkpoint-10" / MANIFEST_NAME).unlink()
        with pytest.raises(ValueError, match=rf"cannot go on from .*checkpoint-10\. {message}"):
            resume(killed, **settings)


def test_beta_may_change_between_two_generations(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=8).train()
    trainer = make_trainer(tmp_path, max_steps=9, beta=0.1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    assert "beta: 0.0 -> 0.1" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [(PROMPTS[:50], "100 rows -> 50 rows"), (PROMPTS[::-1], ""), ([f"{p}a" for p in PROMPTS], "")],
    ids=["halved", "reordered", "rewritten"],
)
def test_a_command_refuses_other_data(killed, prompts, rows):
    checkpoint = killed / "checkpoint-10"
    refuse_changes(run_of_trainer(make_trainer(killed, **SETTINGS)), checkpoint)
    with pytest.raises(ValueError, match=f"The training data are others, or in another order .{rows}"):
        refuse_changes(run_of_trainer(make_trainer(killed, prompts=prompts, **SETTINGS)), checkpoint)


def test_a_run_that_made_all_updates_makes_no_other(tmp_path):
    """One that was killed between its last checkpoint and the save of its model; 8 is within an epoch."""
    make_trainer(tmp_path, max_steps=8, save_strategy="steps", save_steps=8).train()
    trainer = make_trainer(tmp_path, max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def test_fingerprint():
    chat = [{"role": "user", "content": "1 + 1 ="}], [{"role": "user", "content": "2 + 2 ="}]
    rows = Dataset.from_dict({"prompt": [*chat], "solution": ["2", "4"], "image": [b"0", b"1"]})
    again = Dataset.from_list([{"solution": "4", "prompt": chat[1]}, {"solution": "2", "prompt": chat[0]}])
    assert fingerprint(rows) == fingerprint(again.select([1, 0]))  # whatever made it, and without images
    others = again, rows.select([0]), rows.remove_columns("solution"), rows.select([0, 0])
    assert len({fingerprint(each)["sha256"] for each in (rows, *others)}) == 5
    assert fingerprint(rows)["rows"] == 2
    assert fingerprint(IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))) is None


# The model's card


@pytest.mark.parametrize("named", [True, False])
def test_model_card_names_the_model(tmp_path, named):
    trainer = make_trainer(tmp_path / "my-run")
    if not named:
        trainer.model.config._name_or_path = ""
    (tmp_path / "my-run").mkdir(exist_ok=True)
    trainer.create_model_card()
    card = (tmp_path / "my-run" / "README.md").read_text()
    assert "# Model Card for my-run\n" in card
    assert "None" not in card
    assert f"fine-tuned version of {'`recipes/tiny/base`' if named else 'a model'}" in card
    assert f'model="{tmp_path / "my-run"}"' in card
