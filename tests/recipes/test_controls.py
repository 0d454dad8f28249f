"""The controls of the study: their weights, in the loss and in what is logged."""

import pytest
import reference
import torch
from tiny import fixed_rollouts, generate, gradients, last_update, logged, make_trainer, parameters, token_logps

from fipo_trl import DAPOTrainer
from recipes.calibrated.controls import (
    ConstantWeightTrainer,
    ControlTrainer,
    OracleTrainer,
    ShuffledWeightsTrainer,
    UnappliedWeightsTrainer,
)


BOUNDS = {"influence_weight_min": 0.8, "influence_weight_max": 1.2}


class LetterOracle(OracleTrainer):
    """For a task in which the letters of a completion decide, if the prompt has three of them."""

    def decisive_tokens(self, prompt, completion):
        return [character.isalpha() and prompt.count("c") == 1 for character in completion]


CONTROLS = [ShuffledWeightsTrainer, ConstantWeightTrainer, LetterOracle]


def moved_policy(folder, trainer_class, **settings):
    """A trainer at the last update of its first generation, its micro-batch, and a policy that has moved."""
    trainer = make_trainer(folder, trainer_class, keywords={"rollout_func": fixed_rollouts}, **BOUNDS | settings)
    (inputs,) = generate(trainer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer, inputs


def applied(trainer, inputs):
    """FIPO's weights, the control's and where they are scored: each (B, T)."""
    log_ratio = (token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]).detach()
    mask = inputs["completion_mask"]
    fipo, _ = reference.influence(log_ratio, inputs["advantages"], mask, 32.0, 0.8, 1.2, 10.0, 10.0)
    with trainer._loss_scope.open(inputs):
        weights = trainer._influence(log_ratio, inputs["advantages"], mask).weights
        trainer._loss_scope.statistics.append(None)
    trainer._loss_scope.statistics = []
    return fipo.float(), weights, mask == 1


def test_shuffled_weights_are_a_permutation_within_each_answer(tmp_path):
    trainer, inputs = moved_policy(tmp_path, ShuffledWeightsTrainer)
    fipo, weights, scored = applied(trainer, inputs)
    for row, where in enumerate(scored):
        ours, theirs = weights[row][where], fipo[row][where]
        torch.testing.assert_close(ours.sort().values, theirs.sort().values)
    assert not torch.allclose(weights[scored], fipo[scored])
    assert torch.equal(applied(trainer, inputs)[1], weights)  # the same loss
    trainer._step += 1
    assert not torch.equal(applied(trainer, inputs)[1], weights)  # the next one
    trainer._step -= 1
    trainer.args.seed += 1
    assert not torch.equal(applied(trainer, inputs)[1], weights)  # another run


def test_each_place_is_as_likely_as_another(tmp_path):
    trainer, _ = moved_policy(tmp_path, ShuffledWeightsTrainer)
    weights = torch.arange(5.0).repeat(1, 1)
    scored = torch.tensor([[True, True, False, True, True]])
    counts = torch.zeros(5, 5)
    for trainer._step in range(2000):
        shuffled = trainer._control(weights, scored)[0]
        counts[torch.arange(5), shuffled.long()] += 1
    assert counts[2, 2] == 2000
    assert counts[2].count_nonzero() == 1
    others = counts[[0, 1, 3, 4]][:, [0, 1, 3, 4]]
    assert ((others - 500).abs() < 100).all()  # 5 standard deviations


def test_the_constant_weight_is_the_mean_of_the_answer(tmp_path):
    fipo, weights, scored = applied(*moved_policy(tmp_path, ConstantWeightTrainer))
    means = [fipo[row][where].mean() for row, where in enumerate(scored)]
    for row, where in enumerate(scored):
        torch.testing.assert_close(weights[row][where], means[row].expand(int(where.sum())))
    assert len({round(mean.item(), 4) for mean in means}) == len(means)


def test_oracle_weights_are_those_of_the_task(tmp_path):
    trainer, inputs = moved_policy(tmp_path, LetterOracle)
    _, weights, scored = applied(trainer, inputs)
    decisive = 0
    for row, where in enumerate(scored):
        prompt = trainer._tokenizer.decode(inputs["prompt_ids"][row], skip_special_tokens=True)
        tokens = trainer._tokenizer.convert_ids_to_tokens(inputs["completion_ids"][row][where])
        assert tokens[-1] == "<eos>"
        expected = [1.2 if "c" in prompt and token.isalpha() else 0.8 for token in tokens]
        assert weights[row][where].tolist() == pytest.approx(expected)
        decisive += expected.count(1.2)
    assert decisive > 0


def test_a_control_without_weights_of_its_own_is_refused(tmp_path):
    with pytest.raises(TypeError, match="_control"):
        make_trainer(tmp_path, ControlTrainer, **BOUNDS)


def test_unapplied_weights_are_counted_and_the_run_is_dapo(tmp_path):
    schedule = {"keywords": {"rollout_func": fixed_rollouts}, "max_steps": 10, "group_by_length": False}
    unapplied = make_trainer(tmp_path, UnappliedWeightsTrainer, **schedule, **BOUNDS)
    unapplied.train()
    dapo = make_trainer(tmp_path, DAPOTrainer, **schedule)
    dapo.train()
    assert all(torch.equal(value, parameters(dapo)[name]) for name, value in parameters(unapplied).items())
    assert any(0 < share < 1 for share in logged(unapplied, "fipo/active_fraction"))
    trainer, inputs = moved_policy(tmp_path, UnappliedWeightsTrainer)
    fipo, weights, scored = applied(trainer, inputs)
    assert torch.equal(weights[scored], torch.ones_like(weights[scored]))
    last_update(trainer)
    (mean,) = trainer._metrics["train"]["fipo/influence_weight/mean"]
    assert mean == pytest.approx(fipo[scored].mean().item(), rel=1e-5)


def test_oracle_of_too_few_values_is_refused(tmp_path):
    trainer, inputs = moved_policy(tmp_path, LetterOracle)
    trainer.decisive_tokens = lambda prompt, completion: [True]
    with pytest.raises(ValueError, match=r"decisive_tokens gave 1 values for the \d+ tokens of '"):
        applied(trainer, inputs)


@pytest.mark.parametrize("trainer_class", CONTROLS)
def test_the_weights_meet_the_loss_and_the_log(tmp_path, trainer_class):
    trainer, inputs = moved_policy(tmp_path, trainer_class, drop_dual_clipped_sequences=False)
    _, weights, scored = applied(trainer, inputs)
    last_update(trainer)
    actual = gradients(trainer)
    trainer.model.zero_grad()

    args = trainer.args
    log_ratio = token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]
    weighted = inputs["advantages"].unsqueeze(1) * weights
    losses = reference.token_losses(log_ratio, weighted, args.epsilon, args.epsilon_high, args.delta)
    (losses[scored].sum() / (inputs["num_items_in_batch"] / args.updates_per_generation)).backward()
    torch.testing.assert_close(actual, gradients(trainer), rtol=1e-4, atol=1e-5)

    of_log = {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith("fipo/")}
    used = weights[scored]
    expected = {
        "influence_weight/mean": used.mean(),
        "influence_weight/min": used.min(),
        "influence_weight/max": used.max(),
        "influence_weight/low_clip_fraction": (used <= 0.8).float().mean(),
        "influence_weight/high_clip_fraction": (used >= 1.2).float().mean(),
        "active_fraction": ((used - 1).abs() > 1e-4).float().mean(),
    }
    for name, value in expected.items():
        assert of_log[f"fipo/{name}"] == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("trainer_class", CONTROLS)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, trainer_class):
    schedule = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, **BOUNDS}
    uninterrupted = make_trainer(tmp_path, trainer_class, **schedule)
    uninterrupted.train()
    resumed = make_trainer(tmp_path, trainer_class, **schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(value, parameters(resumed)[name]) for name, value in parameters(uninterrupted).items())
    active = logged(uninterrupted, "fipo/active_fraction")
    first = {update: active[update] for update in (0, 8, 16)}  # of a generation
    assert set(first.values()) == ({1.0} if trainer_class is LetterOracle else {0.0})
