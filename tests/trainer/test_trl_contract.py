"""What FIPOTrainer assumes of TRL, one test per assumption: after an upgrade of TRL these say which one broke."""

import inspect

import pytest
import reference
import torch
from tiny import fixed_rollouts, generate, make_trainer, token_logps
from trl import GRPOTrainer


@pytest.fixture
def trainer(tmp_path):
    trainer = make_trainer(tmp_path, GRPOTrainer, keywords={"rollout_func": fixed_rollouts})
    generate(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 1.1
    return trainer


def test_loss_computes_log_probs_once_and_then_reads_advantages(trainer, monkeypatch):
    events = []
    original = trainer._get_per_token_logps_and_entropies

    def log_probs(*args, **kwargs):
        events.append("log-probs")
        return original(*args, **kwargs)

    class Inputs(dict):
        def __getitem__(self, key):
            if key == "advantages":
                events.append("advantages")
            return super().__getitem__(key)

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", log_probs)
    trainer._compute_loss(trainer.model, Inputs(trainer._buffered_inputs[0]))
    assert events == ["log-probs", "advantages"]


def test_log_probs_are_the_first_output_and_differentiable(trainer):
    inputs = trainer._buffered_inputs[0]
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    outputs = trainer._get_per_token_logps_and_entropies(
        trainer.model, input_ids, mask, inputs["completion_ids"].shape[1], compute_entropy=True
    )
    assert outputs[0].requires_grad
    scored = inputs["completion_mask"] == 1
    torch.testing.assert_close(outputs[0][scored], token_logps(trainer.model, inputs)[scored], rtol=1e-4, atol=1e-5)


def test_advantages_may_differ_per_token(trainer):
    inputs = trainer._buffered_inputs[0]
    per_token = dict(inputs, advantages=inputs["advantages"].unsqueeze(1).expand_as(inputs["completion_ids"]).clone())
    assert torch.equal(trainer._compute_loss(trainer.model, inputs), trainer._compute_loss(trainer.model, per_token))
    per_token["advantages"][:, 0] *= 2
    assert not torch.equal(
        trainer._compute_loss(trainer.model, inputs), trainer._compute_loss(trainer.model, per_token)
    )


def test_delta_is_the_dual_clip(trainer):
    inputs = dict(trainer._buffered_inputs[0])
    inputs["advantages"] = -torch.ones_like(inputs["advantages"])
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] - 3.0  # every ratio is near 20, above delta = 10
    loss = trainer._compute_loss(trainer.model, inputs)
    mask = inputs["completion_mask"]
    log_ratio = token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]
    losses = reference.token_losses(log_ratio, inputs["advantages"].unsqueeze(1), 0.2, 0.28, 10.0)
    assert ((losses == 10) & (mask == 1)).any()
    normalizer = inputs["num_items_in_batch"] / trainer.args.updates_per_generation
    torch.testing.assert_close(loss, (losses * mask).sum() / normalizer, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_old_log_probs_come_with_several_updates_per_generation(trainer):
    for inputs in trainer._buffered_inputs:
        assert inputs["old_per_token_logps"].shape == inputs["completion_ids"].shape == inputs["completion_mask"].shape
        assert inputs["advantages"].shape == inputs["completion_ids"].shape[:1]


def test_inputs_are_prepared_once_per_generation(trainer):
    assert len(trainer._buffered_inputs) == trainer.args.steps_per_generation
    first = trainer._buffered_inputs
    for step in range(1, trainer.args.steps_per_generation):
        trainer._step = step
        assert trainer._prepare_inputs(None) is first[step]


@pytest.mark.parametrize(
    "method",
    [
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
        "_get_train_sampler",
        "_load_optimizer_and_scheduler",
        "_save_optimizer_and_scheduler",
        "training_step",
    ],
)
def test_overridden_methods_exist(method):
    assert inspect.isfunction(getattr(GRPOTrainer, method))


def test_order_of_prompts_is_drawn_from_the_sampler(trainer):
    sampler = trainer._get_train_sampler()
    expected = list(sampler)
    again = trainer._get_train_sampler()
    order = torch.randperm(again.num_samples, generator=again.generator)
    assert expected[0] == order[0]
    assert list(again) != expected  # the second epoch's
