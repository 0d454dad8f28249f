"""DAPO's settings stand beside FIPO's: what each trainer takes, and what a promoted GRPOConfig becomes."""

from dataclasses import fields

import pytest
from tiny import PROMPTS, longer_is_better, make_args, make_model, make_trainer
from trl import GRPOConfig

from fipo_trl import DAPOConfig, DAPOTrainer, FIPOConfig, FIPOTrainer


OF_FIPO = {f.name for f in fields(FIPOConfig)} - {f.name for f in fields(DAPOConfig)}


def test_dapo_has_no_setting_of_fipo(tmp_path):
    assert {"future_kl_half_life", "influence_weight_max", "token_credit_every"} <= OF_FIPO
    assert issubclass(FIPOConfig, DAPOConfig)
    for name in OF_FIPO:
        with pytest.raises(TypeError, match=name):
            make_args(tmp_path, DAPOConfig, **{name: 1})


def test_one_update_per_generation_is_allowed(tmp_path):
    args = make_args(tmp_path, DAPOConfig, gradient_accumulation_steps=2, steps_per_generation=2, max_steps=2)
    assert args.updates_per_generation == 1
    trainer = make_trainer(tmp_path, DAPOTrainer, args=args)
    trainer.train()
    assert trainer.state.global_step == 2


def test_merging_an_adapter_without_vllm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vllm_merge_lora=True does nothing without vLLM"):
        make_args(tmp_path, DAPOConfig, vllm_merge_lora=True)


@pytest.mark.parametrize(("trainer_class", "config_class"), [(DAPOTrainer, FIPOConfig), (FIPOTrainer, DAPOConfig)])
def test_the_configuration_of_the_other_trainer_is_refused(tmp_path, trainer_class, config_class):
    wanted = trainer_class._config_class.__name__
    with pytest.raises(TypeError, match=f"args must be a {wanted} or a GRPOConfig, got {config_class.__name__}"):
        trainer_class(make_model(), longer_is_better, make_args(tmp_path, config_class))


def test_a_grpo_config_becomes_a_dapo_config(tmp_path, caplog):
    trainer = make_trainer(tmp_path, DAPOTrainer, args=make_args(tmp_path, GRPOConfig, max_steps=1), prompts=PROMPTS)
    assert type(trainer.args) is DAPOConfig
    notice, growth = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "GRPOConfig was promoted to DAPOConfig" in notice.splitlines()[0]
    assert "  epsilon_high=0.28  (was None)" in notice.splitlines()
    assert "  delta=10.0  (was None)" in notice.splitlines()
    assert "pattern" not in notice
    assert "influence_weight" not in notice
    assert "completions per generation: 4 -> 32, for 8 updates of 4 in place of 1." in growth


def test_a_grpo_config_of_several_updates_trains_on_the_data_that_sufficed(tmp_path, caplog):
    args = make_args(tmp_path, GRPOConfig, generation_batch_size=16, max_steps=4)
    trainer = make_trainer(tmp_path, FIPOTrainer, args=args, prompts=PROMPTS[:16])
    trainer.train()
    assert trainer.args.generation_batch_size == 16
    assert "completions per generation" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, 8),
        ({"gradient_accumulation_steps": 2}, 8),
        ({"num_iterations": 2}, 2),
        ({"generation_batch_size": 8}, 2),
        ({"steps_per_generation": 4}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("config_class", [DAPOConfig, FIPOConfig])
def test_batches_that_give_several_updates_are_kept(tmp_path, config_class, settings, updates):
    theirs = make_args(tmp_path, GRPOConfig, **settings)
    ours, adopted = config_class.from_grpo_config(theirs)
    assert ours.updates_per_generation == updates
    assert ("generation_batch_size" in adopted) == (ours.generation_batch_size != theirs.generation_batch_size)
    assert ("generation_batch_size" in adopted) == (updates == 8)
