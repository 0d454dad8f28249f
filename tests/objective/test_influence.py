import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_trl import influence_weights
from fipo_trl.objective.influence import InfluenceStatistics


# Computed in float64 with the official loss (verl fork), see tests/golden/README.md
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "official_loss.npz")
CASES = json.loads(bytes(GOLDEN["meta"]))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def settings_of(case):
    clip_range = case["clip_range"]
    low = 1.0 if case["clip_high_only"] else 1.0 - clip_range
    bounds = (low, 1.0 + clip_range) if clip_range else (0.0, 10.0)
    return {
        "half_life": case["half_life"],
        "weight_min": bounds[0],
        "weight_max": bounds[1],
        "dual_clip": case["dual_clip"],
        "safety_ratio": case["safety_threshold"],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_official_loss(number, dtype):
    case = CASES[number]
    golden = {key[3:]: torch.from_numpy(GOLDEN[key]) for key in GOLDEN.files if key.startswith(f"{number:02d}/")}
    logps = golden["per_token_logps"].to(dtype).requires_grad_()
    advantages, mask = golden["advantages"].to(dtype), golden["mask"]
    log_ratio = logps - golden["old_per_token_logps"].to(dtype)
    result = influence_weights(log_ratio, advantages, mask, **settings_of(case))

    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    torch.testing.assert_close(result.future_kl * mask, golden["future_kl"] * mask, **tolerance)
    torch.testing.assert_close(result.weights * mask, golden["influence"] * mask, **tolerance)
    final_mask = mask * result.kept.unsqueeze(1)
    assert torch.equal(final_mask, golden["final_mask"])

    losses = reference.token_losses(
        log_ratio,
        result.weights * advantages.unsqueeze(1),
        case["epsilon_low"],
        case["epsilon_high"],
        case["dual_clip"],
    )
    loss = (losses * final_mask).sum() / (final_mask.sum() + 1e-8)  # the official token mean adds 1e-8
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **tolerance)
    torch.testing.assert_close(logps.grad, golden["grad"], **tolerance)

    statistics = result.statistics
    assert statistics.dropped_sequences == case["dropped"]
    fractions = {
        "ppo_kl": statistics.policy_kl,
        "pg_clipfrac_lower": statistics.dual_clipped,
        "clip_frac_upper": statistics.high_clipped,
        "clip_frac_lower": statistics.low_clipped,
        "influence_mean": statistics.weight,
    }
    for name, total in fractions.items():
        # The official means add 1e-8 to the count, which shows at two tokens
        assert (total.double() / statistics.tokens).item() == pytest.approx(golden[name].item(), rel=1e-5, abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.01, 5.0),
    dual_clip=st.floats(1.5, 20),
    safety_ratio=st.floats(1.1, 20),
    bounds=st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 10.0)),
    per_token=st.booleans(),
    participation_mask=st.booleans(),
)
def test_token_by_token(length, seed, spread, dual_clip, safety_ratio, bounds, per_token, participation_mask):
    generator = torch.Generator().manual_seed(seed)
    log_ratio = spread * torch.randn(4, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, length, generator=generator) > 0.2
    advantages = torch.randn((4, length) if per_token else (4,), generator=generator, dtype=torch.float64)
    arguments = {
        "half_life": 8.0,
        "weight_min": bounds[0],
        "weight_max": bounds[1],
        "dual_clip": dual_clip,
        "safety_ratio": safety_ratio,
        "participation_mask": participation_mask,
    }
    weights, kept = reference.influence(log_ratio, advantages, mask, **arguments)
    result = influence_weights(log_ratio, advantages, mask, **arguments)
    torch.testing.assert_close(result.weights[mask], weights[mask], rtol=1e-10, atol=1e-10)
    assert torch.equal(result.kept, kept)
    assert torch.equal(result.masked, mask & (log_ratio.exp() > dual_clip) & participation_mask)
    assert result.statistics.masked == result.masked.sum()
    assert result.statistics.tokens == mask.sum()
    if mask.any():
        assert result.statistics.weight_min == pytest.approx(weights[mask].min().item())
        assert result.statistics.weight_max == pytest.approx(weights[mask].max().item())
        assert result.statistics.weight == pytest.approx(weights[mask].sum().item())
        assert result.statistics.active == (weights[mask] - 1).abs().gt(1e-4).sum()


def test_unmoved_policy_gives_exactly_one():
    for bounds in [(1.0, 1.2), (0.8, 1.2)]:
        result = influence_weights(
            torch.zeros(2, 50),
            torch.tensor([1.0, -1.0]),
            torch.ones(2, 50),
            weight_min=bounds[0],
            weight_max=bounds[1],
        )
        assert torch.equal(result.weights, torch.ones(2, 50))
        assert result.kept.all()
        assert result.statistics.active == 0


def test_participation_is_up_to_and_including_the_dual_clip():
    # The ratio exp(log 2) is exactly 2: it still takes part; the next float does not
    at, above = math.log(2.0), math.nextafter(math.log(2.0), 1.0) + 1e-12
    log_ratio = torch.tensor([[0.0, at], [0.0, above]], dtype=torch.float64)
    result = influence_weights(
        log_ratio, torch.ones(2), torch.ones(2, 2), half_life=1.0, weight_max=10.0, dual_clip=2.0
    )
    torch.testing.assert_close(result.future_kl[0], torch.tensor([at / 2, at], dtype=torch.float64))
    assert result.future_kl[1].tolist() == [0.0, 0.0]
    assert result.statistics.masked == 1


def test_safety_cap_acts_on_negative_advantages_only():
    log_ratio = torch.full((2, 3), math.log(4.0))
    result = influence_weights(log_ratio, torch.tensor([1.0, -1.0]), torch.ones(2, 3), weight_min=0.8, safety_ratio=3)
    torch.testing.assert_close(result.weights, torch.tensor([[1.2] * 3, [1.0] * 3]))
    assert result.statistics.safety_capped == 3


def test_sequence_with_more_than_one_dual_clipped_token_is_dropped():
    jump = math.log(11.0)
    log_ratio = torch.tensor([[jump, jump, 0.0], [jump, 0.0, 0.0], [jump, jump, 0.0], [jump, jump, 0.0]])
    advantages = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]])  # in the last row only one of the two is scored
    result = influence_weights(log_ratio, advantages, mask)
    assert result.kept.tolist() == [False, True, True, True]
    assert result.statistics.dropped_sequences == 1
    assert result.statistics.dropped_tokens == 3
    assert result.statistics.dual_clipped == 4


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_values_do_not_leak(poison):
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 40, generator=generator)
    mask = torch.rand(3, 40, generator=generator) > 0.3
    mask[2] = False  # a row without a scored token
    advantages = torch.tensor([1.0, -1.0, -1.0])
    clean = influence_weights(log_ratio, advantages, mask)
    poisoned = influence_weights(torch.where(mask, log_ratio, poison), advantages, mask)
    assert torch.equal(poisoned.weights[mask], clean.weights[mask])
    assert poisoned.weights.isfinite().all()
    assert torch.equal(poisoned.kept, clean.kept)
    assert [float(value) for value in poisoned.statistics] == [float(value) for value in clean.statistics]
    assert poisoned.statistics.sequences == 2


def test_infinite_log_ratios_of_scored_tokens_are_clamped():
    log_ratio = torch.tensor([[0.0, math.inf], [0.0, -math.inf]])
    result = influence_weights(log_ratio, torch.ones(2), torch.ones(2, 2), half_life=1.0, weight_min=0.0)
    assert result.future_kl.tolist() == [[0.0, 0.0], [-10.0, -20.0]]
    assert result.weights.isfinite().all()


def test_nothing_scored():
    result = influence_weights(torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3))
    assert result.kept.all()
    assert result.statistics.tokens == 0
    assert result.statistics.weight_min == math.inf


def test_result_is_detached():
    log_ratio = torch.randn(2, 3, requires_grad=True)
    result = influence_weights(log_ratio, torch.ones(2), torch.ones(2, 3))
    tensors = [result.weights, result.future_kl, result.kept, *result.statistics]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(tensor.dim() == 0 for tensor in result.statistics)
    assert len(result.statistics) == len(InfluenceStatistics._fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computed_in_float32_or_better(dtype):
    log_ratio = (0.1 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    advantages, mask = torch.ones(2, dtype=dtype), torch.ones(2, 500)
    result = influence_weights(log_ratio, advantages, mask, weight_min=0.1, weight_max=10.0)
    assert result.weights.dtype == torch.float32
    expected, _ = reference.influence(log_ratio.double(), advantages, mask, 32.0, 0.1, 10.0, 10.0, 10.0)
    torch.testing.assert_close(result.weights.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_min": 1.3}, "0 <= weight_min <= weight_max must hold, got 1.3 and 1.2"),
        ({"weight_min": -0.1}, "0 <= weight_min <= weight_max must hold"),
        ({"weight_max": math.nan}, "0 <= weight_min <= weight_max must hold"),
        ({"dual_clip": 1.0}, "dual_clip must be greater than 1, got 1.0"),
        ({"safety_ratio": 0.0}, "safety_ratio must be greater than 0, got 0.0"),
        ({"half_life": 0.0}, "half_life must be greater than 0 tokens, got 0.0"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        influence_weights(torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3), **arguments)


def test_advantages_must_fit():
    with pytest.raises(ValueError, match=r"advantages must have shape \(B,\) or \(B, T\) = \(2, 3\), got \(3,\)"):
        influence_weights(torch.zeros(2, 3), torch.ones(3), torch.ones(2, 3))
