"""Evaluation during training: what it reports is what the policy answers, and training does not notice it."""

import json
import random
import subprocess
import sys

import evaluate_on_ranks
import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig
from tiny import PROMPTS, make_trainer, parameters
from transformers.integrations.integration_utils import rewrite_logs

from fipo_trl import DAPOTrainer, FIPOTrainer
from fipo_trl.evaluation.callback import EvaluationCallback
from fipo_trl.recipe.validate import read_and_validate


PROBLEMS = Dataset.from_dict({"prompt": PROMPTS[:5], "solution": ["a", "b", "c", "d", "e"]})
DROPOUT = {"peft_config": LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)}
GREEDY = {"temperature": 1.0, "top_p": 1e-6}  # nothing but the likeliest token is left to sample from


def has_solution(completions, solution, **kwargs):
    return [float(answer in completion) for completion, answer in zip(completions, solution, strict=True)]


def predicted_answer(completion):
    return completion


def train(folder, evaluate=True, resume=None, trainer_class=FIPOTrainer, keywords=None, sampling=GREEDY, **settings):
    trainer = make_trainer(folder, trainer_class, keywords=keywords, **{"eval_steps": 3, "max_steps": 10} | settings)
    if evaluate:
        trainer.add_callback(EvaluationCallback(trainer, {"held_out": PROBLEMS}, has_solution, n=3, **sampling))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer):
    return {row["step"]: row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row)}


def rest_of(log_history):
    unequal = ("_runtime", "_per_second", "step_time")
    rows = [{k: v for k, v in row.items() if not k.endswith(unequal)} for row in log_history]
    return [row for row in rows if not any(name.startswith("eval_") for name in row)]


@pytest.mark.parametrize(
    ("trainer_class", "keywords", "settings"),
    [
        (FIPOTrainer, None, {"logging_steps": 3}),
        (DAPOTrainer, None, {"dynamic_sampling": True, "log_completions": True}),
        (FIPOTrainer, DROPOUT, {}),
    ],
    ids=["fipo", "dapo", "dropout"],
)
def test_training_does_not_notice(tmp_path, trainer_class, keywords, settings):
    sampled = {"temperature": 1.5, "top_p": 0.9}
    runs = [
        train(tmp_path / str(evaluate), evaluate, None, trainer_class, keywords, sampled, **settings)
        for evaluate in (True, False)
    ]
    assert list(evaluations(runs[0])) == [0, 3, 6, 9, 10]
    assert not evaluations(runs[1])
    with_evaluation, without = map(parameters, runs)
    assert all(torch.equal(with_evaluation[name], without[name]) for name in without)
    assert rest_of(runs[0].state.log_history) == rest_of(runs[1].state.log_history)
    assert len(rest_of(runs[1].state.log_history)) > 3
    assert runs[0].generation_config.top_p == runs[1].generation_config.top_p == 1.0
    assert runs[0]._logs["completion"] == runs[1]._logs["completion"]


def greedy(trainer):
    texts = []
    trainer.model.eval()
    for prompt in PROBLEMS["prompt"]:
        ids = torch.tensor([trainer.processing_class.encode(prompt)])
        output = trainer.model.generate(input_ids=ids, do_sample=False, max_new_tokens=trainer.max_completion_length)
        texts.append(trainer.processing_class.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("keywords", [None, DROPOUT], ids=["full", "dropout"])
def test_reports_what_the_policy_answers(tmp_path, keywords):
    # A top-p given in this way wins over all other settings, in training
    trainer = train(tmp_path, keywords=keywords, generation_kwargs={"top_p": 0.5})
    assert trainer.model.training
    assert trainer.generation_kwargs["top_p"] == trainer.generation_config.top_p == 0.5
    row = evaluations(trainer)[10]
    texts = greedy(trainer)
    right = [answer in text for answer, text in zip(PROBLEMS["solution"], texts, strict=True)]
    assert row["eval_held_out/avg@3"] == row["eval_held_out/cons@3"] == row["eval_held_out/pass@3"]
    assert row["eval_held_out/avg@3"] == pytest.approx(sum(right) / 5)
    ended = [len(text) < trainer.max_completion_length for text in texts]
    lengths = torch.tensor([len(text) + end for text, end in zip(texts, ended, strict=True)], dtype=torch.float64)
    assert row["eval_held_out/mean_length"] == pytest.approx(lengths.mean().item())
    assert row["eval_held_out/length_median"] == lengths.median().item()
    assert row["eval_held_out/truncated"] == pytest.approx(1 - sum(ended) / 5)
    assert "eval/held_out/avg@3" in rewrite_logs(row)  # what trackers show


def test_samples_differ_and_follow_temperature(tmp_path):
    seen = {}

    def watch(completions, **kwargs):
        seen.setdefault(len(seen), completions)
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, eval_steps=1)
    random.seed(5)
    np.random.seed(5)
    expected = [random.random(), np.random.random()]
    random.seed(5)
    np.random.seed(5)
    for temperature in (1e-4, 1.0):
        EvaluationCallback(trainer, {"x": PROBLEMS}, watch, n=8, temperature=temperature, top_p=1.0).evaluate("x")
    cold, warm = ([len(set(texts[first : first + 8])) for first in range(0, 40, 8)] for texts in seen.values())
    assert max(cold) == 1
    assert min(warm) > 4
    assert [random.random(), np.random.random()] == expected  # reward functions in training may use them


def test_resumed_run_evaluates_each_step_once(tmp_path):
    sampled = {"temperature": 1.0, "top_p": 0.9}
    whole = train(tmp_path / "whole", sampling=sampled, save_strategy="steps", save_steps=3)
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-6"), sampling=sampled)
    steps = [row["step"] for row in resumed.state.log_history if "eval_held_out/avg@3" in row]
    assert steps == [0, 3, 6, 9, 10]
    assert evaluations(resumed) == evaluations(whole)
    # A checkpoint without the evaluation of its step, as when that one was interrupted
    state = tmp_path / "whole" / "checkpoint-6" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"] = [row for row in content["log_history"] if "eval_held_out/avg@3" not in row]
    state.write_text(json.dumps(content))
    again = train(tmp_path / "again", resume=str(state.parent), sampling=sampled)
    assert list(evaluations(again)) == [6, 9, 10]
    assert evaluations(again)[6] == evaluations(whole)[6]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Of 15 completions, process 0 makes 8 and process 1 makes 7 and one that does not count."""
    config = ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    evaluate_on_ranks.main(tmp_path / "one")
    command = [sys.executable, *launcher, evaluate_on_ranks.__file__, str(tmp_path / "two")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["greedy"] == one["greedy"]
    assert 0 < one["greedy"]["avg@3"] < 1
    assert two["different_answers"] == one["different_answers"] == 16  # the processes draw from states of their own
    assert two["same_on_all"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval_problems aime24", "eval_steps is not set: give the number of updates"),
        ("--eval_top_p 0.7", "'eval_top_p' does nothing without eval_problems"),
        ("--eval_problems x --eval_steps 8 --eval_top_p 0", r"eval_top_p=0\.0 must be greater than 0 and at most 1"),
        ("--eval_problems x --eval_steps 8 --eval_temperature 0", r"eval_temperature=0\.0 must be greater than 0"),
        ("--eval_problems x --eval_steps 8 --eval_samples 0", "eval_samples=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        read_and_validate(["--config", "recipes/tiny/fipo.yaml", *flags.split()])
