import json
import logging
import os
import random
import sqlite3
import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import fixed_rollouts, generate, logged, make_args, make_trainer
from trl import GRPOTrainer

from fipo_trl import DAPOTrainer, FIPOConfig, FIPOTrainer
from fipo_trl.analysis.collapse import (
    GRAD_NORM_SPIKE,
    HISTORY,
    PATIENCE,
    POLICY_KL_SPIKE,
    CollapseAlarm,
    collapse_at,
)
from fipo_trl.trainer.metrics import (
    BEHAVIOURS,
    behaviour,
    count_self_checks,
    counters,
    decoded_texts,
    generation_metrics,
)
from recipes.tiny import running_sums


TINY = yaml.safe_load((ROOT / "recipes/tiny/fipo.yaml").read_text())
TINY_PATTERNS = TINY["derivation_pattern"], TINY["self_check_pattern"]


# Metrics of a generation


@pytest.mark.parametrize(
    ("accumulation", "steps", "iterations"), [(1, 8, 1), (2, 16, 1), (3, 4, 2), (4, 2, 1), (1, 1, 1)]
)
def test_counters_equal_a_count_of_generations(tmp_path, accumulation, steps, iterations):
    args = make_args(
        tmp_path, gradient_accumulation_steps=accumulation, steps_per_generation=steps, num_iterations=iterations,
        influence_weight_max=1.0, drop_dual_clipped_sequences=False,
    )  # fmt: skip
    generations, updates = 0, 0
    assert counters(0, args) == {"rollout_iteration": 0, "optimizer_update": 0}
    for micro_step in range(48):
        generations += micro_step % (steps * iterations) == 0  # as TRL decides
        if (micro_step + 1) % accumulation == 0:
            updates += 1
            assert counters(updates, args) == {"rollout_iteration": generations, "optimizer_update": updates}


@pytest.mark.parametrize(("tools", "truncated"), [(False, False), (True, False), (False, True)])
def test_generation_metrics_equal_numpy(tools, truncated):
    generator = np.random.default_rng(0)
    rows, width = 37, 50
    lengths = generator.integers(1, width + 1, rows)
    mask = (np.arange(width) < lengths[:, None]).astype(int)
    generation = {"completion_mask": torch.tensor(mask), "advantages": torch.tensor(generator.normal(size=rows))}
    scored = lengths.copy()
    if tools:
        tool_mask = generator.integers(0, 2, (rows, width)) | (np.arange(width) == 0)
        generation["tool_mask"] = torch.tensor(tool_mask)
        scored = lengths = (mask * tool_mask).sum(axis=1)
    if truncated:  # as mask_truncated_completions leaves them
        generation["completion_mask"][lengths == width] = 0
        generation["completion_mask"][:3] = 0
        scored[:3], lengths[:3] = 0, width
        scored[lengths == width] = 0
    texts = ["plan", "1 + 1 = 2", "1 + 1 = 2. Wait, 3. Let me check: 2"] * 12 + ["= 1"]
    metrics = generation_metrics(generation, texts, *DEFAULTS, Accelerator(cpu=True))
    expected = {
        "completions/q25_length": np.percentile(lengths, 25),
        "completions/median_length": statistics.median(lengths.tolist()),
        "completions/q75_length": np.percentile(lengths, 75),
        "completions/length_weighted_advantage": np.average(generation["advantages"], weights=scored),
        "behaviour/no_derivation": 12 / 37,
        "behaviour/one_chain": 13 / 37,
        "behaviour/one_self_check": 0,
        "behaviour/several_self_checks": 12 / 37,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_metrics_of_a_run_equal_those_of_its_rollouts(tmp_path):
    """From the completions and the reward alone; on rows of training and of evaluation."""
    generations = []

    def rollouts(prompts, trainer):
        rollout = fixed_rollouts(prompts, trainer)
        generations.append((trainer.model.training, rollout["completion_ids"]))
        return rollout

    trainer = make_trainer(
        tmp_path, keywords={"rollout_func": rollouts}, max_steps=12, num_iterations=2, steps_per_generation=2,
        gradient_accumulation_steps=1, derivation_pattern="a", self_check_pattern="b",
    )  # fmt: skip
    trainer.eval_dataset = trainer.train_dataset.select(range(1))
    trainer.args.per_device_eval_batch_size = 4
    trainer.train()
    trainer.evaluate()
    rows = [row for row in trainer.state.log_history if "completions/q25_length" in row]
    assert [row["step"] for row in rows] == [1, 5, 9]
    rows += [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [training for training, _ in generations] == [True] * 3 + [False]
    for row, (training, completions) in zip(rows, generations, strict=True):
        prefix = "" if training else "eval_"
        lengths = np.array(list(map(len, completions)))
        texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        rewards = np.array([len(text) + text.count("a") / 7 for text in texts]).reshape(-1, 4)
        centered = rewards - rewards.mean(axis=1, keepdims=True)
        advantages = (centered / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)).ravel()
        for name, percent in [("q25", 25), ("median", 50), ("q75", 75)]:
            assert row[f"{prefix}completions/{name}_length"] == pytest.approx(np.percentile(lengths, percent))
        weighted = row[f"{prefix}completions/length_weighted_advantage"]
        assert weighted == pytest.approx((lengths * advantages).sum() / lengths.sum(), abs=1e-5)
        places = [0 if "a" not in t else 1 + min(2, t[t.index("a") :].count("b")) for t in texts]
        for place, name in enumerate(BEHAVIOURS):
            assert row[f"{prefix}behaviour/{name}"] == pytest.approx(places.count(place) / len(places))
    for row in trainer.state.log_history:  # every one: training, evaluation and summary
        assert row["optimizer_update"] == row["step"]
        assert row["rollout_iteration"] == -(-row["step"] // 4)


def test_completions_are_decoded_once(tmp_path, monkeypatch):
    """By TRL, for the rewards; dynamic sampling replays them to it, which decodes them again."""
    trainers = [make_trainer(tmp_path, dynamic_sampling=dynamic) for dynamic in (False, True)]
    decoded = []
    original = type(trainers[0].processing_class).batch_decode
    monkeypatch.setattr(
        type(trainers[0].processing_class), "batch_decode", lambda *a, **k: decoded.append(1) or original(*a, **k)
    )
    counts = []
    for trainer in trainers:
        decoded.clear()
        generate(trainer)
        counts.append(len(decoded))
    rounds = trainers[1]._metrics["train"]["dynamic_sampling/rounds"][0]
    assert counts == [1, 1 + rounds]


@pytest.mark.parametrize(
    ("completions", "parser", "texts"),
    [
        (["a", "b"], None, ["a", "b"]),
        ([[{"role": "assistant", "content": text}] for text in "ab"], None, ["a", "b"]),
        ([[{"role": "assistant", "content": text}] for text in "ab"], "response_schema", None),
        ([[{"role": "assistant", "content": text}] for text in "ab"], "response_template", None),
        ([[{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]], None, None),
    ],
)
def test_what_trl_decoded_is_taken_where_it_is_all_of_the_text(completions, parser, texts):
    assert decoded_texts(completions, SimpleNamespace(**({parser: "..."} if parser else {}))) == texts


# Behaviours

DEFAULTS = FIPOConfig.derivation_pattern, FIPOConfig.self_check_pattern
ANSWERS = [
    ("First we list the cases, then we add them up. Answer: 7", None),
    ("", None),
    ("Let me check the problem again. Wait. Answer: 4", None),
    ("We have 3 + 4 = 7.\nAnswer: 7", 0),
    (r"So $x = \frac{1}{2}$ and $y=2x$. Answer: 1/2", 0),
    ("3 + 4 = 7. Let me verify: 7 - 4 = 3, right. Answer: 7", 1),
    ("3 + 4 = 7. Wait, let me double-check that: alternatively 4 + 3 = 7. Answer: 7", 1),  # one sentence
    ("3 + 4 = 7\nWait, is it?\nAlternatively, count up. Another way: recompute it. Answer: 7", 3),
    ("Wait, 3 + 4 = 7. So 7 awaits. Answer: 7", 0),  # before the derivation, and within a word
]


@pytest.mark.parametrize(("answer", "checks"), ANSWERS)
def test_default_patterns(answer, checks):
    assert count_self_checks(answer, *DEFAULTS) == checks
    assert (
        BEHAVIOURS[behaviour(answer)]
        == {
            None: "no_derivation",
            0: "one_chain",
            1: "one_self_check",
            3: "several_self_checks",
        }[checks]
    )


def test_patterns_of_the_tiny_recipes_are_exact():
    rng = random.Random(0)
    answers = ["".join(rng.choices("ab01:? A", k=rng.randint(0, 40))) for _ in range(3000)]  # dense in accidents
    answers += ["".join(rng.choices(["a3:3 ", "b0:4 ", "?", "A:2", "a"], k=rng.randint(0, 12))) for _ in range(3000)]
    for _ in range(500):
        answers.append(running_sums.worked_answer(rng, running_sums.make_problem(rng), rng.randint(0, 4), 0.3))
    seen = set()
    for answer in answers:
        expected = running_sums.count_checks(answer)
        assert count_self_checks(answer, *TINY_PATTERNS) == expected, answer
        seen.add(expected)
    assert seen >= {None, 0, 1, 2, 3}
    for path in (ROOT / "recipes/tiny").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        assert (recipe["derivation_pattern"], recipe["self_check_pattern"]) == TINY_PATTERNS


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("(", "not a regular expression"), ("a*", "matches the empty text")]
)
@pytest.mark.parametrize("name", ["derivation_pattern", "self_check_pattern"])
def test_bad_pattern_is_refused(tmp_path, name, pattern, complaint):
    with pytest.raises(ValueError, match=f"{name}=.*{complaint}"):
        make_args(tmp_path, **{name: pattern})


# The collapse alarm


def healthy(count, start=0):
    return [
        {
            "loss": 0.0,
            "step": start + i + 1,
            "policy/dual_clip_fraction": 0.0,
            "policy/kl": 0.001,
            "grad_norm": 0.1 + i % 3 / 100,
            "completions/mean_length": 50.0,
        }
        for i in range(count)
    ]


def first_alarm(rows):
    return next(filter(None, (collapse_at(rows[:end]) for end in range(len(rows) + 1))), None)


def changed(rows, changes):
    for place, values in changes.items():
        rows[place] |= values
    return rows


DUAL, KL, NORM = {"policy/dual_clip_fraction": 0.001}, {"policy/kl": 0.2}, {"grad_norm": 2.0}


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({}, None),
        ({30: DUAL}, None),
        ({30: DUAL | KL}, None),
        ({30: DUAL | NORM}, None),
        ({30: KL | NORM}, None),
        ({30: DUAL | KL | NORM}, 30),
        ({30: DUAL, 33: KL, 36: NORM}, 36),
        ({30: DUAL, 33: NORM, 36: KL}, 36),
        ({29: KL | NORM, 30: DUAL}, None),  # dual clips come first
        ({30: DUAL, 30 + PATIENCE - 1: KL | NORM}, 30 + PATIENCE - 1),
        ({30: DUAL, 30 + PATIENCE: KL | NORM}, None),
        ({30: DUAL | KL | {"grad_norm": float("nan")}}, 30),
        ({30: DUAL | NORM | {"policy/kl": None}, 31: NORM}, None),  # a row that lacks a metric does not count
        ({30: DUAL | KL | {"grad_norm": 0.11 * GRAD_NORM_SPIKE}}, None),  # a bound is not above itself
        ({30: DUAL | NORM | {"policy/kl": POLICY_KL_SPIKE}}, None),
        ({0: DUAL | KL | NORM}, None),  # nothing before it says what is usual
    ],
)
def test_signature(changes, alarm):
    rows = changed(healthy(60), changes)
    collapse = first_alarm(rows)
    assert (collapse and collapse.update) == (alarm and alarm + 1)


def test_signature_where_dual_clips_are_usual():
    rows = [row | DUAL for row in healthy(HISTORY + 40)]
    place = HISTORY + 20
    rows[place] |= KL | NORM | {"policy/dual_clip_fraction": 0.009}  # not ten times the usual
    assert first_alarm(rows) is None
    rows[place]["policy/dual_clip_fraction"] = 0.011
    assert first_alarm(rows).update == place + 1


def test_alarm_tells_its_numbers():
    rows = changed(healthy(60), {30: DUAL, 33: KL, 36: NORM | {"completions/mean_length": 20.0}})
    rows.insert(36, {"step": 36, "eval_loss": 1.0})  # an evaluation in between
    collapse = first_alarm(rows)
    assert (collapse.dual_clip_update, collapse.dual_clip_fraction, collapse.policy_kl) == (31, 0.001, 0.2)
    assert (collapse.grad_norm, collapse.length, collapse.usual_length) == (2.0, 20.0, 50.0)
    assert collapse.usual_grad_norm == statistics.median(row["grad_norm"] for row in rows[:30])
    for number in ("0.001 at update 31", "0.2 nats", "norm 2 (usually 0.11)", "20 tokens (usually 50)"):
        assert number in str(collapse)
    for row in rows:
        row.pop("completions/mean_length", None)
    assert "length" not in str(first_alarm(rows))


# A policy that is thrown about: ratios above c soon, KL of whole nats
UNSTABLE = {"learning_rate": 0.1, "delta": 1.5, "epsilon_high": 0.28, "influence_weight_max": 10.0, "max_steps": 40}


@pytest.mark.parametrize("trainer_class", [FIPOTrainer, DAPOTrainer])
@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_alarm_in_a_run(tmp_path, caplog, trainer_class, on_collapse):
    alarm = CollapseAlarm(on_collapse)
    trainer = make_trainer(tmp_path, trainer_class, keywords={"callbacks": [alarm]}, **UNSTABLE)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [record.message for record in caplog.records if "looks as if it collapses" in record.message]
    expected = first_alarm(trainer.state.log_history)
    assert str(expected) in message
    assert expected.update < 40
    # The checkpoint of that moment, and no other: save_strategy is "no"
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{expected.update}"
    if on_collapse == "stop":
        assert alarm.stopped == expected
        assert trainer.state.global_step == expected.update
        # To go on from there is a decision that is not overruled
        again = CollapseAlarm("stop")
        resumed = make_trainer(tmp_path, trainer_class, keywords={"callbacks": [again]}, **UNSTABLE)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert again.stopped is None
        assert resumed.state.global_step == 40
    else:
        assert alarm.stopped is None
        assert trainer.state.global_step == 40


def test_alarm_is_silent_on_a_gentle_run(tmp_path, caplog):
    trainer = make_trainer(tmp_path, keywords={"callbacks": [CollapseAlarm("stop")]}, learning_rate=1e-3, max_steps=24)
    trainer.train()
    assert trainer.state.global_step == 24
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "collapse" not in caplog.text


def test_alarm_says_that_it_sees_nothing(tmp_path, caplog):
    trainer = make_trainer(tmp_path, GRPOTrainer, keywords={"callbacks": [CollapseAlarm()]}, max_steps=3)
    trainer.train()
    assert caplog.text.count("CollapseAlarm is off, for policy/dual_clip_fraction and policy/kl is not logged") == 1


def test_bad_on_collapse_is_refused():
    with pytest.raises(ValueError, match="on_collapse='halt' must be 'warn' or 'stop'"):
        CollapseAlarm("halt")


def test_control_arm_logs_the_same_policy_metrics(tmp_path):
    """With every weight 1 and no sequence dropped, FIPO is DAPO: so must be what both say of the policy."""
    settings = {"learning_rate": 0.05, "delta": 1.5, "max_steps": 12, "influence_weight_max": 1.0}
    settings |= {"drop_dual_clipped_sequences": False}
    logs = []
    for trainer_class in (FIPOTrainer, DAPOTrainer):
        trainer = make_trainer(tmp_path, trainer_class, keywords={"rollout_func": fixed_rollouts}, **settings)
        trainer.train()
        logs.append({name: logged(trainer, name) for name in ("policy/kl", "policy/dual_clip_fraction")})
        assert len(logs[-1]["policy/kl"]) == 12
        assert max(logs[-1]["policy/dual_clip_fraction"]) > 0
    assert logs[0] == logs[1]


# Trackers


TRACKED = """
import sys
from tiny import make_trainer

trainer = make_trainer(sys.argv[1], max_steps=9, report_to=["tensorboard", "trackio"], project="curves")
trainer.train()
trainer.save_state()
"""


@pytest.mark.slow
def test_trackers_receive_what_is_logged(tmp_path):
    """Through transformers' integrations. In a process of its own, as trackio reads its folder when it is imported."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
    }
    command = [sys.executable, "-c", TRACKED, str(tmp_path / "run")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    expected = {row["step"]: row for row in state["log_history"] if "loss" in row}
    assert len(expected) == 9
    curves = {name for row in expected.values() for name in row} - {"step", "epoch"}
    assert {"rollout_iteration", "optimizer_update", "behaviour/one_chain", "policy/kl"} <= curves
    assert {"completions/q25_length", "completions/length_weighted_advantage"} <= curves

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    with sqlite3.connect(tmp_path / "trackio" / "curves.db") as database:
        stored = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics")]
    stored = {row["train/global_step"]: row for row in stored if "train/loss" in row}
    for name in curves:
        points = {step: row[name] for step, row in expected.items() if name in row}
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx(points, rel=1e-6), name
        kept = {step: row[f"train/{name}"] for step, row in stored.items() if f"train/{name}" in row}
        assert kept == pytest.approx(points, rel=1e-9), name
