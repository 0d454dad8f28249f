"""The command line, from the outside: scripts/train_fipo.py, alone and under `accelerate launch`."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from held import REWARD, HeldRun
from peft import AutoPeftModelForCausalLM
from rewards_for_tests import COLLAPSE_FLAGS
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_model
from transformers import AutoTokenizer

from fipo_trl.data.sources import load_splits
from fipo_trl.evaluation.callback import EvaluationCallback
from fipo_trl.recipe.build import build
from fipo_trl.recipe.validate import read_and_validate
from fipo_trl.rewards.names import load_rewards
from fipo_trl.trainer.manifest import faults
from fipo_trl.trainer.resume import find_checkpoint


RECIPE = "recipes/tiny/fipo.yaml"
SCRIPT = [sys.executable, "scripts/train_fipo.py"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "scripts/train_fipo.py"]
SHORT = ["--max_completion_length", 32]


def launch(recipe, output_dir, *arguments, check=True, command=SCRIPT):
    command = [*command, "--config", recipe, "--output_dir", str(output_dir), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 or not check, run.stderr
    return run


def log_of(output_dir, step):
    return json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_trains_from_a_recipe(tmp_path):
    settings = ["--max_steps", 16, "--save_steps", 16, "--report_to", "tensorboard"]
    run = launch(RECIPE, tmp_path, *settings, command=ACCELERATE)
    assert f"Trained for 16 updates. The model is in {tmp_path}." in run.stdout
    before, after = load_file("recipes/tiny/base/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert "Future-KL Influenced Policy Optimization" in (tmp_path / "README.md").read_text()
    rows = log_of(tmp_path, 16)
    assert [row["step"] for row in rows if "loss" in row] == [8, 16]
    assert rows[-1]["fipo/active_fraction"] > 0

    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/fipo/influence_weight/mean")}
    expected = {row["step"]: row["fipo/influence_weight/mean"] for row in rows if "fipo/influence_weight/mean" in row}
    assert logged == pytest.approx(expected)


@pytest.mark.slow
def test_control_arm_is_dapo(tmp_path):
    run = launch(RECIPE, tmp_path, *SHORT, "--max_steps", 8, "--save_steps", 8, "--trainer", "dapo")
    assert "Trained for 8 updates" in run.stdout
    logged = set().union(*log_of(tmp_path, 8))
    assert "policy/kl" in logged
    assert not any(name.startswith("fipo/") for name in logged)


@pytest.mark.slow
def test_collapse_stops_the_run_where_that_is_asked(tmp_path):
    run = launch(RECIPE, tmp_path, *COLLAPSE_FLAGS, check=False, command=ACCELERATE)
    assert "returned non-zero exit status 3." in run.stderr  # accelerate itself exits with 1
    assert "Stopped at update" in run.stdout
    assert "because on_collapse is 'stop': dual-clip fraction" in run.stdout
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    stopped = int(last.name.split("-")[1])
    assert stopped < 200
    assert log_of(tmp_path, stopped)[-1]["step"] == stopped
    assert not (tmp_path / "model.safetensors").exists()  # the checkpoint is its last word


@pytest.mark.slow
def test_lora_saves_an_adapter(tmp_path):
    launch("recipes/tiny/fipo_lora.yaml", tmp_path, *SHORT, "--max_steps", 8)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    moved = [p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(moved)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_resumes_exactly(tmp_path):
    arguments = [*REWARD, "--max_steps", "24", "--save_steps", "24", "--logging_steps", "1"]
    launch(RECIPE, tmp_path / "uninterrupted", *arguments)

    # The script itself: a terminal sends Ctrl-C to it and to its launcher alike
    interrupted = [sys.executable, "scripts/train_fipo.py", "--config", RECIPE]
    interrupted += ["--output_dir", str(tmp_path / "interrupted"), *arguments]
    with HeldRun(interrupted, tmp_path / "held", generation=2) as run:
        run.signal(signal.SIGINT)
        assert run.let_go() == 130, run.log.read_text()
    assert "--resume_from_checkpoint latest" in run.log.read_text()
    (checkpoint,) = (tmp_path / "interrupted").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-9"  # the first update of the second generation
    assert not (tmp_path / "interrupted" / "model.safetensors").exists()

    again = launch(RECIPE, tmp_path / "interrupted", *arguments, check=False)
    assert again.returncode != 0
    assert "of an earlier run. Pass --resume_from_checkpoint latest" in again.stderr
    launch(RECIPE, tmp_path / "interrupted", *arguments, "--resume_from_checkpoint", "latest")
    expected = load_file(tmp_path / "uninterrupted" / "model.safetensors")
    resumed = load_file(tmp_path / "interrupted" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "argument: nothing reads 'learning_rat'. Did you mean 'learning_rate'?"),
        (["--max_step", "1"], "argument: nothing reads 'max_step'. Did you mean 'max_steps'?"),
        (
            ["--future_kl_halflife=8"],
            "argument: nothing reads 'future_kl_halflife'. Did you mean 'future_kl_half_life'?",
        ),
        (["--config", "recipes/none.yaml"], "--config recipes/none.yaml: there is no such file."),
        (["--delta", "1.0"], "delta=1.0 must be greater than 1 + epsilon_high"),
        (["--steps_per_generation", "1"], "FIPO would be DAPO: steps_per_generation=1 x num_iterations=1"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--trainer", "grop"], "'trainer' must be one of fipo, dapo, or an import path"),
        (["--lora_r", "8"], "'lora_r' does nothing without use_peft: true"),
        (["-learning_rate", "1"], "'-learning_rate' is not understood. Flags start with two dashes"),
        (["learning_rate=1"], "'learning_rate=1' is not understood."),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "recipes"], "--config recipes: there is no such file."),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        read_and_validate(["--config", RECIPE, *arguments] if "--config" not in arguments else arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("influence_wieght_min: 1.0", "nothing reads 'influence_wieght_min'. Did you mean 'influence_weight_min'?"),
        ("decay_rate: 32", "nothing reads 'decay_rate'."),
        ("learning_rate: 1.0e-6", "'learning_rate' is given 2 times. Keep one."),
        ("help: true", "nothing reads 'help'."),
        (
            "trainer: grop",
            "'trainer' must be one of fipo, dapo, or an import path such as my_module.MyTrainer",
        ),
        (
            "drop_dual_clipped_sequences: [false]",
            "'drop_dual_clipped_sequences' takes one value, got the list [False].",
        ),
        ("drop_dual_clipped_sequences: 5", "Truthy value expected: got 5"),
        ("num_train_epochs: many", "invalid float value: 'many'"),
        ("eval_steps: [1]", "'eval_steps' takes one value, got the list [1]."),
        ("num_iterations: 1.5", "invalid int value: '1.5'"),
        ("epsilon: null", "'epsilon' cannot be null."),
        ("epsilon: {low: 0.2}", "'epsilon' cannot be a mapping."),
        ("lora_r: 16", "'lora_r' does nothing without use_peft: true."),
        ("epsilon: {", "is not valid YAML"),
    ],
)
def test_wrong_recipe(tmp_path, line, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(RECIPE).read_text() + line + "\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_and_validate(["--config", str(recipe)])
    assert message in str(error.value)


def test_errors_come_without_a_traceback(tmp_path):
    run = launch(RECIPE, tmp_path, "--infuence_weight_min", "1", check=False)
    assert run.returncode == 1
    assert "error: argument: nothing reads 'infuence_weight_min'. Did you mean 'influence_weight_min'?" in run.stderr
    assert "Traceback" not in run.stderr.split("error:")[0]


def test_recipe_must_be_a_mapping(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- learning_rate\n")
    with pytest.raises(ValueError, match="must hold 'key: value' lines"):
        read_and_validate([f"--config={recipe}"])


def test_values_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("FIPO_TEST", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "env: {FIPO_TEST: 7}\noutput_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\nreward_funcs: my.reward\n"
        "model_init_kwargs: {use_cache: false}\neval_steps: null\nfuture_kl_half_life: .inf\n"
        "reward_weights: [1, 0.5]\nbf16: false\n"
    )
    parsed = read_and_validate(["--config", str(recipe)])
    args = parsed.training
    assert parsed.env == {"FIPO_TEST": "7"}
    assert "FIPO_TEST" not in os.environ  # it is set by the command that trains
    assert args.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert parsed.run.reward_funcs == ["my.reward"]
    assert args.model_init_kwargs == {"use_cache": False}
    assert args.future_kl_half_life == float("inf")
    assert args.reward_weights == [1, 0.5]
    assert args.bf16 is False


def test_flags_win_over_the_recipe():
    args = read_and_validate(["--config", RECIPE, "--learning_rate", "0.5", "--influence_weight_min", "0.8"]).training
    assert (args.learning_rate, args.influence_weight_min) == (0.5, 0.8)
    args = read_and_validate(
        ["--config", RECIPE, "--generation_batch_size", "64"]
    ).training  # in place of steps_per_generation
    assert args.steps_per_generation == 4  # given in another way


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "no_such_reward"], "reward_funcs: cannot load 'no_such_reward'"),
        (
            ["--reward_funcs", "no_such.module.reward"],
            "cannot load 'no_such.module.reward' (No module named 'no_such')",
        ),
        (["--reward_funcs", "tests.tiny.columns"], "cannot load 'tests.tiny.columns'"),
        (["--reward_funcs", "recipes.tiny.running_sums.MODULUS"], "it is a int, not a function"),
        (["--dataset_name", "recipes/no_data"], "dataset_name: cannot load 'recipes/no_data'"),
        (["--dataset_train_split", "training"], "The dataset has no split 'training', only "),
        (
            ["--reward_funcs", "trl.rewards.accuracy_reward", "tests.rewards_for_tests.needs_column"],
            "no column 'level'",
        ),
    ],
)
def test_data_and_rewards_are_checked_before_the_model_is_loaded(tmp_path, arguments, message):
    parsed = read_and_validate(
        ["--config", RECIPE, "--output_dir", str(tmp_path), "--model_name_or_path", "not/loaded", *arguments]
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build(parsed)


def test_rewards_by_name():
    recipe = read_and_validate(
        ["--config", RECIPE, "--reward_funcs", "accuracy_reward", "get_soft_overlong_punishment"]
    )
    args = recipe.training
    accuracy, overlong = load_rewards(recipe.run.reward_funcs, args.max_completion_length)
    assert accuracy.__module__.startswith("trl.rewards")
    length = args.max_completion_length
    ids = [[0] * (length * 4 // 5), [0] * length]
    assert overlong(completion_ids=ids) == [0.0, -1.0]


GYM = ["--dataset_name", "reasoning_gym/gcd", "--reward_funcs", "reasoning_gym_reward", "reasoning_gym_accuracy"]


@pytest.mark.slow
def test_trains_on_a_task_of_reasoning_gym(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("recipes/tiny/base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    settings = {"size": 20, "test_size": 3, "seed": 4, "max_value": 50}
    (tmp_path / "recipe.yaml").write_text(f"{Path(RECIPE).read_text()}\ndataset_settings: {settings}\n")
    arguments = ["--model_name_or_path", tmp_path / "model", "--max_completion_length", 8, "--max_steps", 8]
    arguments += ["--reward_weights", 1, 0, "--output_dir", tmp_path / "out", "--max_prompt_length", 400]
    arguments += ["--eval_problems", "reasoning_gym/gcd", "--eval_reward", "reasoning_gym_accuracy", "--eval_steps", 8]
    arguments += ["--eval_samples", 2]
    parsed = read_and_validate(["--config", str(tmp_path / "recipe.yaml"), *GYM, *map(str, arguments)])
    trainer = build(parsed)
    splits = load_splits("reasoning_gym/gcd", task_settings=settings)
    assert trainer.train_dataset.to_list() == splits["train"].to_list()
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, EvaluationCallback)]
    assert callback.exams["gcd"].columns["problem"] == splits["test"]["problem"][:]
    trainer.train()
    rows = trainer.state.log_history
    assert {"rewards/reasoning_gym_reward/mean", "rewards/reasoning_gym_accuracy/mean"} <= set().union(*rows)
    assert [row["step"] for row in rows if "eval_gcd/cons@2" in row] == [0, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GYM, "--dataset_settings", "{size: 2}"], "dataset_settings={size: 2} is not valid JSON"),
        ([*GYM, "--dataset_settings", "[1]"], "dataset_settings=[1] must be a mapping, such as"),
        (["--dataset_settings", "{}"], "'dataset_settings' does nothing with dataset_name=recipes/tiny/data."),
    ],
)
def test_dataset_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_and_validate(["--config", RECIPE, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_settings", '{"max": 3}'], "dataset_settings: reasoning_gym/gcd has no setting 'max'"),
        (
            ["--dataset_streaming", "true"],
            "dataset_name: 'reasoning_gym/gcd' takes no dataset_config or dataset_streaming",
        ),
        (
            ["--reward_funcs", "dapo_reward", "no_such_reward"],
            "(dapo_reward, dapo_accuracy, overlong_penalty, reasoning_gym_reward, ",
        ),
        (["--dataset_name", "reasoning_gym/gdc"], "Did you mean 'reasoning_gym/gcd'?"),
        (["--dataset_name", "recipes/tiny/data"], "no column 'problem'"),
    ],
)
def test_tasks_are_checked_before_the_model_is_loaded(tmp_path, arguments, message):
    parsed = read_and_validate(["--config", RECIPE, "--output_dir", str(tmp_path), *GYM, *arguments])
    with pytest.raises(ValueError, match=re.escape(message)):
        build(parsed)


def checkpoint_of(recipe):
    training = recipe.training
    return find_checkpoint(training.output_dir, training.resume_from_checkpoint, training.max_steps)


def test_resume_from_what_is_not_there(tmp_path, caplog):
    resume = ["--config", RECIPE, "--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    assert checkpoint_of(read_and_validate([*resume, "latest"])) is None  # a restart loop begins so
    assert "holds no checkpoint: the run starts anew" in caplog.text
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint_of(read_and_validate([*resume, str(tmp_path / "none")]))


def test_resume_from_a_finished_run(tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 8}))
    save_file({}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, checkpoint / name)
    resume = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"has made 8 of max_steps=7 updates\. Raise max_steps"):
        checkpoint_of(read_and_validate(["--config", RECIPE, *resume, "--max_steps", "7"]))
    assert checkpoint_of(read_and_validate(["--config", RECIPE, *resume, "--max_steps", "8"])) == str(checkpoint)
    assert "has made all of max_steps=8 updates" in caplog.text
    assert checkpoint_of(read_and_validate(["--config", RECIPE, *resume, "--max_steps", "9"])) == str(checkpoint)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_data(tmp_path):
    small = [*SHORT, "--max_steps", 1, "--save_steps", 1]
    launch(RECIPE, tmp_path, *small)
    assert faults(tmp_path / "checkpoint-1") == {}
    assert "# Model Card for " + tmp_path.name in (tmp_path / "README.md").read_text()
    assert "None" not in (tmp_path / "README.md").read_text()
    assert "on `recipes/tiny/data`" in (tmp_path / "README.md").read_text()
    assert "/datasets/" not in (tmp_path / "README.md").read_text()
    again = [*small, "--resume_from_checkpoint", "latest", "--max_steps", 2]
    run = launch(RECIPE, tmp_path, *again, "--dataset_train_split", "test", check=False)
    assert run.returncode == 1
    assert "error: The run cannot go on from " in run.stderr
    assert "The training data are others" in run.stderr
    run = launch(RECIPE, tmp_path, *again, "--learning_rate", "1e-3")
    assert re.search(r"From here on: learning_rate: \S+ -> 0\.001\.", run.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_in_use_or_not_writable_is_refused_at_the_start(tmp_path, processes):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "fipo_trl", "train", "--cpu", "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "--config", RECIPE, "--per_device_train_batch_size", "8", "--output_dir"]
    with (tmp_path / "_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 17 on another-host")
        lock.flush()
        for folder, message in [
            (tmp_path, "is in use: process 17 on another-host trains in it."),
            (tmp_path / "file" / "run", "cannot be written: Not a directory."),
        ]:
            run = subprocess.run([*command, str(folder)], capture_output=True, text=True)
            assert run.returncode == 1, run.stderr
            assert run.stderr.count(f"error: output_dir={folder} {message}") == 1, run.stderr
            assert "Traceback" not in run.stderr.split("error: output_dir")[0]


def test_help_names_every_setting():
    environment = os.environ | {"COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "scripts/train_fipo.py", "--help"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0
    for text in (
        "--config RECIPE.yaml",
        "--trainer TRAINER",
        "--influence_weight_max",
        "--lora_r",
        "--reward_funcs",
    ):
        assert text in run.stdout
