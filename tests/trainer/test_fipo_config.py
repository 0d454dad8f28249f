import math
import warnings
from dataclasses import fields

import pytest
from tiny import make_args
from transformers import HfArgumentParser
from trl import GRPOConfig

from fipo_trl import DAPOConfig, FIPOConfig


def test_defaults_are_the_papers(tmp_path):
    args = FIPOConfig(str(tmp_path), use_cpu=True)
    assert (args.future_kl_half_life, args.influence_weight_min, args.influence_weight_max) == (32.0, 1.0, 1.2)
    assert (args.influence_safety_ratio, args.drop_dual_clipped_sequences) == (10.0, True)
    assert (args.loss_type, args.epsilon, args.epsilon_high, args.delta, args.beta) == ("dapo", 0.2, 0.28, 10.0, 0.0)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert args.vllm_importance_sampling_correction is False


@pytest.mark.parametrize("accumulation", [1, 4])
def test_eight_updates_per_generation(tmp_path, accumulation):
    args = make_args(tmp_path, gradient_accumulation_steps=accumulation)
    assert args.steps_per_generation == 8 * accumulation
    assert args.generation_batch_size == 4 * 8 * accumulation
    assert args.updates_per_generation == 8


def test_batch_settings_of_the_user_are_kept(tmp_path):
    assert make_args(tmp_path, steps_per_generation=4).updates_per_generation == 4
    assert make_args(tmp_path, generation_batch_size=8).updates_per_generation == 2
    assert make_args(tmp_path, steps_per_generation=1, num_iterations=3).updates_per_generation == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": None}, "delta=None must be greater than 1 + epsilon_high = 1.28.*Set delta=10.0"),
        ({"delta": 1.28}, "delta=1.28 must be greater than 1 + epsilon_high = 1.28"),
        ({"delta": 1.2, "epsilon_high": None}, "delta=1.2 must be greater than 1 + epsilon_high = 1.2:"),
        ({"influence_weight_min": 1.3}, "influence_weight_min=1.3 and influence_weight_max=1.2 must satisfy"),
        ({"influence_weight_min": 0.0}, "influence_weight_min=0.0 .* 0 < min <= max < inf.* set 1.0 and 1.2"),
        ({"influence_weight_max": math.nan}, "influence_weight_max=nan must satisfy"),
        ({"future_kl_half_life": 0}, "future_kl_half_life=0 must be greater than 0 tokens. Set 32.0"),
        ({"future_kl_half_life": -1.0}, "future_kl_half_life=-1.0 must be greater than 0 tokens"),
        ({"influence_safety_ratio": 0}, "influence_safety_ratio=0 must be greater than 0. Set 10.0"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' .* Set .*='token'"),
        ({"loss_type": "cispo"}, "loss_type='cispo' is not supported.* Set loss_type to 'dapo'"),
        ({"loss_type": "sapo"}, "loss_type='sapo' is not supported"),
        ({"loss_type": "luspo"}, "loss_type='luspo' is not supported"),
        ({"loss_type": "vespo"}, "loss_type='vespo' is not supported"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 10},
            "lr_scheduler_type='constant' ignores warmup_steps=10. Set lr_scheduler_type='constant_with_warmup'",
        ),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        make_args(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "arithmetic"),
    [
        (
            {"steps_per_generation": 1},
            "steps_per_generation=1 x num_iterations=1 / gradient_accumulation_steps=1 = 1 ",
        ),
        ({"generation_batch_size": 4}, "= 1 gradient updates per generation"),
        (
            {"gradient_accumulation_steps": 8, "steps_per_generation": 4},
            "gradient_accumulation_steps=8 = 0.5 gradient",
        ),
    ],
)
def test_one_update_per_generation_is_refused(tmp_path, settings, arithmetic):
    with pytest.raises(ValueError, match="FIPO would be DAPO") as error:
        make_args(tmp_path, **settings)
    assert arithmetic in str(error.value)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    fix = f"Set steps_per_generation={8 * accumulation} (that is, generation_batch_size={32 * accumulation})"
    assert fix in str(error.value)
    # What the error proposes works
    make_args(tmp_path, gradient_accumulation_steps=accumulation, steps_per_generation=8 * accumulation)
    make_args(tmp_path, gradient_accumulation_steps=accumulation, generation_batch_size=32 * accumulation)
    make_args(tmp_path, **settings, influence_weight_min=1.0, influence_weight_max=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling_oversample": "4"}, "dynamic_sampling_oversample=4 does nothing without dynamic_sampling"),
        ({"dynamic_sampling_strict": True}, "dynamic_sampling_strict=True does nothing"),
        ({"dynamic_sampling": True, "dynamic_sampling_oversample": 0.5}, "oversample=0.5 must be 'auto' or a factor"),
        ({"dynamic_sampling": True, "dynamic_sampling_oversample": "much"}, "oversample=much must be 'auto' or"),
        ({"dynamic_sampling": True, "dynamic_sampling_oversample": "inf"}, "oversample=inf must be 'auto' or"),
        ({"dynamic_sampling": True, "dynamic_sampling_max_rounds": 0}, "max_rounds=0 must be at least 1"),
    ],
)
def test_dynamic_sampling_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


def test_dynamic_sampling_factor_may_come_as_text(tmp_path):
    args = make_args(tmp_path, dynamic_sampling=True, dynamic_sampling_oversample="3")
    assert args.dynamic_sampling_oversample == 3.0
    assert make_args(tmp_path, dynamic_sampling=True).dynamic_sampling_oversample == "auto"


def test_fipo_can_be_switched_off(tmp_path):
    assert make_args(tmp_path, influence_weight_min=1.0, influence_weight_max=1.0).fipo_is_off
    assert not make_args(tmp_path).fipo_is_off


def test_no_discount_is_allowed(tmp_path):
    assert make_args(tmp_path, future_kl_half_life=math.inf).future_kl_half_life == math.inf


def test_sequence_level_vllm_correction_warns(tmp_path):
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    for mode in ("sequence_mask", "sequence_truncate"):
        with pytest.warns(UserWarning, match=f"vllm_importance_sampling_mode='{mode}'.*token_truncate"):
            make_args(tmp_path, **vllm, vllm_importance_sampling_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_args(tmp_path, **vllm, vllm_importance_sampling_mode="token_truncate")
        make_args(tmp_path, use_vllm=True)


def test_grpo_config_promotion_keeps_what_the_user_set(tmp_path):
    theirs = make_args(tmp_path, GRPOConfig, delta=5.0, loss_type="grpo", generation_batch_size=16, warmup_steps=3)
    ours, adopted = FIPOConfig.from_grpo_config(theirs)
    assert (ours.delta, ours.loss_type, ours.generation_batch_size, ours.warmup_steps) == (5.0, "grpo", 16, 3)
    assert (ours.epsilon_high, ours.lr_scheduler_type) == (0.28, "constant_with_warmup")
    assert adopted.keys() == {
        "future_kl_half_life",
        "future_kl_participation_mask",
        "influence_weight_min",
        "influence_weight_max",
        "influence_safety_ratio",
        "drop_dual_clipped_sequences",
        "derivation_pattern",
        "self_check_pattern",
        "group_by_length",
        "epsilon_high",
        "lr_scheduler_type",
        "vllm_importance_sampling_correction",
    }
    assert ours.to_dict().keys() == FIPOConfig(str(tmp_path), use_cpu=True).to_dict().keys()


def test_grpo_config_promotion_checks(tmp_path):
    with pytest.raises(ValueError, match="loss_type='cispo' is not supported"):
        FIPOConfig.from_grpo_config(make_args(tmp_path, GRPOConfig, loss_type="cispo"))


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(FIPOConfig).parse_args(["--help"])
    text = capsys.readouterr().out
    for name in (
        f.name for f in fields(FIPOConfig) if f.name in DAPOConfig.__annotations__ | FIPOConfig.__annotations__
    ):
        assert f"--{name}" in text
        assert FIPOConfig.__dataclass_fields__[name].metadata["help"]
