import math
import shutil
from pathlib import Path

import pytest
import reference
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny import (
    BASE,
    PROMPTS,
    fixed_rollouts,
    generate,
    gradients,
    last_update,
    logged,
    longer_is_better,
    make_args,
    make_model,
    make_trainer,
    parameters,
    token_logps,
)
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from fipo_trl import FIPOConfig, FIPOTrainer


ROLLOUTS = {"rollout_func": fixed_rollouts}
# Without grouping, because another padding rounds otherwise
OFF = {
    "influence_weight_min": 1.0,
    "influence_weight_max": 1.0,
    "drop_dual_clipped_sequences": False,
    "group_by_length": False,
}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # TRL computes log-probs in float32, whatever the model
METRICS = {
    "fipo/future_kl",
    "fipo/influence_weight/mean",
    "fipo/influence_weight/min",
    "fipo/influence_weight/max",
    "fipo/influence_weight/low_clip_fraction",
    "fipo/influence_weight/high_clip_fraction",
    "fipo/active_fraction",
    "fipo/masked_fraction",
    "fipo/safety_fraction",
    "policy/dual_clip_fraction",
    "fipo/dropped_sequence_fraction",
    "policy/kl",
}


def moved_policy(tmp_path, scale=0.3, **settings):
    """A trainer, one of its micro-batches, and a policy that has moved since it generated."""
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, **settings)
    inputs = generate(trainer)[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return trainer, inputs


def official_loss(trainer, inputs, log_ratio, mask):
    """The official loss before aggregation, (B, T), and the sequences kept."""
    args = trainer.args
    weights, kept = reference.influence(
        log_ratio.detach(),
        inputs["advantages"],
        mask,
        args.future_kl_half_life,
        args.influence_weight_min,
        args.influence_weight_max,
        args.delta,
        args.influence_safety_ratio,
        args.future_kl_participation_mask,
    )
    weighted = weights * inputs["advantages"].unsqueeze(1)
    return reference.token_losses(log_ratio, weighted, args.epsilon, args.epsilon_high, args.delta), kept


@pytest.mark.parametrize(
    "settings",
    [
        {"influence_safety_ratio": 3.0},
        {"influence_safety_ratio": 3.0, "influence_weight_min": 0.8},
        {"influence_safety_ratio": 1.5, "influence_weight_min": 0.1, "influence_weight_max": 5.0},
        {"influence_safety_ratio": 2.0, "influence_weight_min": 0.1, "delta": 3.0},
        {"future_kl_half_life": 2.0, "influence_weight_min": 1e-6, "influence_weight_max": 1e6},
        {"influence_weight_min": 0.1, "epsilon": 0.1, "epsilon_high": 0.5},
        {
            "future_kl_participation_mask": False,
            "delta": 3.0,
            "influence_weight_min": 0.1,
            "influence_weight_max": 5.0,
        },
    ],
    ids=str,
)
def test_loss_and_gradient_are_the_official_ones(tmp_path, settings):
    trainer, inputs = moved_policy(tmp_path, drop_dual_clipped_sequences=False, **settings)
    inputs["advantages"] = torch.tensor([1.0, -1.0, 0.5, -2.0])
    inputs["old_per_token_logps"][3, :2] -= 5
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    actual = gradients(trainer)
    trainer.model.zero_grad()

    mask = inputs["completion_mask"]
    log_ratio = token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]
    losses, kept = official_loss(trainer, inputs, log_ratio, mask)
    assert not kept.all()  # the case is not trivial: tokens are dual-clipped, and a sequence would be dropped
    # TRL's "dapo": the mean number of scored tokens per update of this generation
    expected = (losses * mask).sum() / (inputs["num_items_in_batch"] / trainer.args.updates_per_generation)
    expected.backward()
    torch.testing.assert_close(loss, expected, **FLOAT32)
    official = gradients(trainer)
    # Large weights make large gradients, of which small ones are differences
    largest = max(gradient.abs().max().item() for gradient in official.values())
    torch.testing.assert_close(actual, official, **FLOAT32 | {"atol": max(1e-5, 1e-6 * largest)})


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_dropped_sequences_leave_the_token_mean(tmp_path, gradient_accumulation_steps):
    accumulation = {"gradient_accumulation_steps": gradient_accumulation_steps}
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, **accumulation)
    batches = generate(trainer)
    worst = min(batches, key=lambda batch: batch["advantages"].min())
    row = worst["advantages"].argmin()
    worst["old_per_token_logps"][row, :2] -= 3  # two tokens with a ratio of 20 and a negative advantage
    last_update(trainer)
    actual = gradients(trainer)
    trainer.model.zero_grad()

    total, kept_tokens, scored_tokens = 0.0, 0, 0
    for batch in batches:
        mask = batch["completion_mask"]
        losses, kept = official_loss(
            trainer, batch, token_logps(trainer.model, batch) - batch["old_per_token_logps"], mask
        )
        total = total + (losses * mask * kept.unsqueeze(1)).sum()
        kept_tokens += (mask * kept.unsqueeze(1)).sum()
        scored_tokens += mask.sum()
    assert kept_tokens < scored_tokens
    # TRL divides by the mean number of scored tokens per update; FIPO by its share that is kept in this update
    mean_tokens = batches[0]["num_items_in_batch"] / trainer.args.updates_per_generation
    (total / (mean_tokens * kept_tokens / scored_tokens)).backward()
    torch.testing.assert_close(actual, gradients(trainer), **FLOAT32)
    dropped = trainer._metrics["train"]["fipo/dropped_sequence_fraction"]
    assert dropped == [pytest.approx(1 / (4 * gradient_accumulation_steps))]


def test_dropped_sequences_stay_in_a_mean_over_sequences(tmp_path):
    # Only a token mean is corrected: here a dropped sequence counts as one with a loss of 0
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, loss_type="grpo")
    (batch,) = generate(trainer)
    row = batch["advantages"].argmin()
    batch["old_per_token_logps"][row, :2] -= 3
    last_update(trainer)
    actual = gradients(trainer)
    trainer.model.zero_grad()
    mask = batch["completion_mask"]
    losses, kept = official_loss(
        trainer, batch, token_logps(trainer.model, batch) - batch["old_per_token_logps"], mask
    )
    assert kept.sum() == len(kept) - 1
    ((losses * mask).sum(dim=1) / mask.sum(dim=1) * kept).mean().backward()
    torch.testing.assert_close(actual, gradients(trainer), **FLOAT32)


def test_tool_output_is_not_scored(tmp_path):
    def rollouts_with_tools(prompts, trainer):
        output = fixed_rollouts(prompts, trainer)
        output["env_mask"] = [[int(i % 3 != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
        return output

    trainer = make_trainer(
        tmp_path,
        keywords={"rollout_func": rollouts_with_tools},
        influence_weight_min=0.1,
    )
    inputs = generate(trainer)[0]
    inputs["old_per_token_logps"] -= 0.1 * torch.randn(inputs["old_per_token_logps"].shape)
    inputs["old_per_token_logps"][inputs["tool_mask"] == 0] = math.nan
    with trainer._loss_scope.open(inputs) as weighted_inputs:
        logps = token_logps(trainer.model, inputs).detach()
        trainer._loss_scope.statistics.append(trainer._weight_advantages(logps))
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    assert 0 < mask.sum() < inputs["completion_mask"].sum()
    weights, _ = reference.influence(
        token_logps(trainer.model, inputs) - inputs["old_per_token_logps"],
        inputs["advantages"],
        mask,
        32.0,
        0.1,
        1.2,
        10.0,
        10.0,
    )
    expected = inputs["advantages"].unsqueeze(1) * weights
    torch.testing.assert_close(weighted_inputs["advantages"][mask == 1], expected[mask == 1], **FLOAT32)


def test_inputs_are_not_mutated(tmp_path):
    # With num_iterations=2 TRL uses each micro-batch twice: written into, the weights would compound
    trainer, inputs = moved_policy(tmp_path, num_iterations=2)
    keys = set(inputs)
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    first = trainer.compute_loss(trainer.model, inputs)
    second = trainer.compute_loss(trainer.model, inputs)
    assert first.item() == second.item()
    assert inputs.keys() == keys
    for key, value in before.items():
        assert torch.equal(inputs[key], value), key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo"},
        {"loss_type": "bnpo"},
        {"beta": 0.04, "num_iterations": 2},
        {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    ],
    ids=str,
)
def test_weights_of_one_are_grpo_bit_for_bit(tmp_path, settings):
    finals = []
    for trainer_class in (GRPOTrainer, FIPOTrainer):
        trainer = make_trainer(tmp_path, trainer_class, **OFF, **settings)
        trainer.train()
        finals.append((parameters(trainer), logged(trainer, "loss"), logged(trainer, "reward")))
    (theirs, their_losses, their_rewards), (ours, our_losses, our_rewards) = finals
    assert our_losses == their_losses
    assert our_rewards == their_rewards
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(theirs[name], value) for name, value in make_model().named_parameters())


def test_fipo_differs_from_grpo(tmp_path):
    finals = []
    for trainer_class in (GRPOTrainer, FIPOTrainer):
        trainer = make_trainer(tmp_path, trainer_class)
        trainer.train()
        finals.append(parameters(trainer))
    assert any(not torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "bnpo"},
        {"beta": 0.04},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_trains_and_logs(tmp_path, settings):
    trainer = make_trainer(tmp_path, **settings)
    before = parameters(trainer)
    trainer.train()
    assert trainer.state.global_step == 16
    assert all(not torch.equal(before[name], value) for name, value in parameters(trainer).items())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows:
        assert row.keys() >= METRICS
        assert all(math.isfinite(row[name]) for name in METRICS)
    generation_starts = range(0, 16, int(trainer.args.updates_per_generation))
    active = logged(trainer, "fipo/active_fraction")
    if "bf16" not in settings:
        # The first update after a generation is DAPO's: the policy is still the one that generated
        assert [active[i] for i in generation_starts] == [0.0] * len(generation_starts)
    assert sum(active) > 0


def test_metrics_of_one_update(tmp_path):
    trainer, inputs = moved_policy(tmp_path, scale=0.5, influence_weight_min=0.8, influence_safety_ratio=3.0)
    last_update(trainer)
    trainer.model.zero_grad()
    metrics = {
        name: values for name, values in trainer._metrics["train"].items() if name.startswith(("fipo/", "policy/"))
    }
    assert metrics.keys() == METRICS
    assert all(len(values) == 1 for values in metrics.values())

    mask = inputs["completion_mask"] == 1
    log_ratio = (token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]).detach()
    ratio, negative = log_ratio.exp(), (inputs["advantages"] < 0).unsqueeze(1)
    weights, kept = reference.influence(log_ratio, inputs["advantages"], mask, 32.0, 0.8, 1.2, 10.0, 3.0)
    kl = reference.future_kl(log_ratio, mask & (ratio <= 10), 32.0)
    expected = {
        "fipo/future_kl": kl[mask].mean(),
        "fipo/influence_weight/mean": weights[mask].mean(),
        "fipo/influence_weight/min": weights[mask].min(),
        "fipo/influence_weight/max": weights[mask].max(),
        "fipo/influence_weight/low_clip_fraction": (weights <= 0.8)[mask].double().mean(),
        "fipo/influence_weight/high_clip_fraction": (weights >= 1.2)[mask].double().mean(),
        "fipo/active_fraction": ((weights - 1).abs() > 1e-4)[mask].double().mean(),
        "fipo/masked_fraction": (ratio > 10)[mask].double().mean(),
        "fipo/safety_fraction": ((ratio > 3) & negative)[mask].double().mean(),
        "policy/dual_clip_fraction": ((ratio > 10) & negative)[mask].double().mean(),
        "fipo/dropped_sequence_fraction": (~kept).double().mean(),
        "policy/kl": -log_ratio[mask].mean(),
    }
    for name, value in expected.items():
        assert metrics[name][0] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert metrics["fipo/masked_fraction"][0] > 0  # the case is not trivial
    assert metrics["fipo/safety_fraction"][0] > 0


def test_warns_once_when_fipo_is_inert(tmp_path, caplog):
    make_trainer(tmp_path, learning_rate=0.0, max_steps=24).train()
    warnings = [record.message for record in caplog.records if "FIPO is not acting" in record.message]
    assert len(warnings) == 1
    assert "last 16 updates (two generations)" in warnings[0]
    assert "learning_rate=0.0" in warnings[0]

    caplog.clear()
    make_trainer(tmp_path, learning_rate=0.0, max_steps=15).train()
    make_trainer(tmp_path, max_steps=24).train()
    make_trainer(tmp_path, learning_rate=0.0, max_steps=24, **OFF).train()
    assert "FIPO is not acting" not in caplog.text


def test_lora(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path,
        keywords={"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
        gradient_accumulation_steps=2,
    )
    before = parameters(trainer)
    trainer.train()
    moved = {name for name, value in parameters(trainer).items() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if "lora_" in name}
    assert sum(logged(trainer, "fipo/active_fraction")) > 0

    make_model().save_pretrained(tmp_path / "base")
    trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer.save_model(tmp_path / "adapter")
    loaded = dict(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").named_parameters())
    for name, value in parameters(trainer).items():
        torch.testing.assert_close(loaded[name], value)


@pytest.mark.parametrize("settings", [{}, {"disable_dropout": True}], ids=str)
def test_dropout_is_warned_of(tmp_path, caplog, settings):
    """With it the first update of a generation has weights other than 1, though the policy has not moved."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer(tmp_path, keywords={"peft_config": peft_config}, max_steps=1, **settings)
    trainer.train()
    warned = "The model has dropout (0.5;" in caplog.text
    assert warned == (logged(trainer, "fipo/active_fraction")[0] > 0) == (settings == {})


def test_evaluation(tmp_path):
    held_out = Dataset.from_dict({"prompt": PROMPTS[:4]})
    evaluation = {"eval_strategy": "steps", "eval_steps": 8, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, keywords={"eval_dataset": held_out}, **evaluation)
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 2
    assert all("eval_reward" in row for row in evaluations)
    assert not any("fipo" in name for row in evaluations for name in row)  # every weight would be 1
    # and they are not in the metrics of the next update, of which there would be more sequences
    assert len(logged(trainer, "fipo/active_fraction")) == 16
    assert trainer._loss_scope.statistics == []


class Kill(Exception):
    """Stands for a process that dies."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Kill


@pytest.mark.parametrize("save_steps", [8, 5], ids=["between generations", "inside a generation"])
@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        pytest.param(PROMPTS, {}, id="plain"),
        pytest.param(
            PROMPTS,
            {"gradient_accumulation_steps": 2, "num_iterations": 2},
            id="accumulation and iterations",
            marks=pytest.mark.slow,
        ),
        pytest.param(PROMPTS[:8], {}, id="an epoch is one generation", marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, save_steps, prompts, settings):
    schedule = {"max_steps": 20, "logging_steps": 4, "save_strategy": "steps", "save_steps": save_steps}
    settings = settings | {"prompts": prompts} | schedule
    uninterrupted = make_trainer(tmp_path / "uninterrupted", **settings)
    uninterrupted.train()

    killed = make_trainer(tmp_path / "killed", keywords={"callbacks": [KillAt(save_steps + 2)]}, **settings)
    with pytest.raises(Kill):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    for name in ("reward", "entropy", "fipo/future_kl", "completions/q75_length"):  # rows span both runs
        assert logged(resumed, name) == logged(uninterrupted, name) != []
    expected = parameters(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed).items())


def test_resuming_with_another_layout_starts_a_new_generation(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=5).train()
    trainer = make_trainer(tmp_path, max_steps=8, steps_per_generation=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 8
    assert "holds no generation state for these processes and batch layout" in caplog.text

    caplog.clear()
    (tmp_path / "checkpoint-5" / "generation_state_0.pt").unlink()
    make_trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "holds no generation state for these processes and batch layout" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-5")


def test_too_few_prompts_for_one_generation(tmp_path):
    trainer = make_trainer(tmp_path, prompts=PROMPTS[:7])
    with pytest.raises(
        ValueError, match="train_dataset has 7 rows, fewer than the 8 prompts of one generation"
    ) as error:
        trainer.train()
    assert "lower steps_per_generation=8" in str(error.value)


def test_grpo_config_is_promoted(tmp_path, caplog):
    args = make_args(tmp_path, GRPOConfig, gradient_accumulation_steps=2, epsilon=0.1, max_steps=4)
    trainer = make_trainer(tmp_path, args=args)
    assert isinstance(trainer.args, FIPOConfig)
    assert trainer.args.steps_per_generation == 16
    assert trainer.args.generation_batch_size == 64
    assert trainer.args.epsilon == 0.1
    assert (args.delta, args.steps_per_generation, args.generation_batch_size) == (None, 2, 8)  # not touched
    messages = [record.message for record in caplog.records if "promoted to FIPOConfig" in record.message]
    assert len(messages) == 1
    for value in ("delta=10.0", "epsilon_high=0.28", "future_kl_half_life=32.0", "steps_per_generation=16"):
        assert value in messages[0]
    assert "epsilon=" not in messages[0]
    trainer.train()
    assert sum(logged(trainer, "fipo/active_fraction")) > 0


def test_args_may_be_omitted(tmp_path, monkeypatch):
    model = make_model()
    model.config.name_or_path = str(Path(BASE).resolve())
    monkeypatch.chdir(tmp_path)
    trainer = FIPOTrainer(model, longer_is_better, train_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    assert isinstance(trainer.args, FIPOConfig)
    assert trainer.args.output_dir == Path(BASE).name + "-FIPO"
    assert trainer.args.updates_per_generation == 8


def test_args_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be a FIPOConfig or a GRPOConfig, got dict"):
        FIPOTrainer(make_model(), longer_is_better, {"learning_rate": 1e-6})


def test_model_card_cites_fipo(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Future-KL Influenced Policy Optimization" in card
    assert "2603.19835" in card
    assert "fipo" in trainer.model.model_tags
