import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_trl import future_kl


LENGTHS = [1, 2, 3, 127, 128, 129, 1000, 20480]


def random_batch(length, rows=3, seed=0, hole_fraction=0.2):
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) > hole_fraction
    return log_ratio, mask


@pytest.mark.parametrize("half_life", [0.5, 8.0, 32.0, 256.0, 1e6, math.inf])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_serial_recurrence(length, half_life):
    log_ratio, mask = random_batch(length)
    expected = reference.future_kl(log_ratio, mask, half_life)
    torch.testing.assert_close(future_kl(log_ratio, mask, half_life=half_life), expected, rtol=1e-10, atol=1e-10)
    in_float32 = future_kl(log_ratio.float(), mask, half_life=half_life)
    assert in_float32.dtype == torch.float32
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(in_float32.double(), expected, rtol=0, atol=2e-6 * scale)


def test_literal_values():
    # half-life 1: gamma = 1/2; the second token is left out but keeps its distance
    log_ratio = torch.tensor([[1.0, 100.0, 2.0, 4.0]])
    mask = torch.tensor([[1, 0, 1, 1]])
    expected = torch.tensor([[1.0 + 2.0 / 4 + 4.0 / 8, 2.0 / 2 + 4.0 / 4, 2.0 + 4.0 / 2, 4.0]])
    torch.testing.assert_close(future_kl(log_ratio, mask, half_life=1.0), expected, rtol=0, atol=0)


def test_longest_sequence():
    # A constant log-ratio has a closed form, (1 - gamma^n) / (1 - gamma), which a cumulative-sum trick underflows
    length, half_life = 131_072, 32.0
    gamma = 2.0 ** (-1 / half_life)
    result = future_kl(torch.ones(1, length), torch.ones(1, length), half_life=half_life)[0].double()
    remaining = torch.arange(length, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(result, (1 - gamma**remaining) / (1 - gamma), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_summed_in_float32(dtype):
    # In bfloat16 gamma would round to 0.9805: a half-life of 35.1 tokens instead of 32
    log_ratio, mask = random_batch(1000)
    log_ratio = log_ratio.to(dtype)
    result = future_kl(log_ratio, mask, half_life=32.0)
    assert result.dtype == torch.float32
    expected = reference.future_kl(log_ratio, mask, 32.0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def test_autocast_does_not_lower_the_precision():
    log_ratio, mask = random_batch(1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = future_kl(log_ratio.float(), mask, half_life=32.0)
    torch.testing.assert_close(result.double(), reference.future_kl(log_ratio, mask, 32.0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_values_are_never_read(poison):
    log_ratio, mask = random_batch(300)
    expected = future_kl(log_ratio, mask, half_life=32.0)
    poisoned = torch.where(mask, log_ratio, poison)
    torch.testing.assert_close(future_kl(poisoned, mask, half_life=32.0), expected, rtol=0, atol=0)


def test_rows_without_a_token_are_zero():
    log_ratio = torch.full((2, 5), math.nan)
    assert future_kl(log_ratio, torch.zeros(2, 5), half_life=32.0).tolist() == [[0.0] * 5] * 2
    assert future_kl(torch.empty(2, 0), torch.empty(2, 0), half_life=32.0).shape == (2, 0)


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 300),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    half_life=st.floats(0.01, 1e5),
    hole_fraction=st.floats(0, 1),
)
def test_random_masks(length, rows, seed, half_life, hole_fraction):
    log_ratio, mask = random_batch(length, rows, seed, hole_fraction)
    expected = reference.future_kl(log_ratio, mask, half_life)
    torch.testing.assert_close(future_kl(log_ratio, mask, half_life=half_life), expected, rtol=1e-10, atol=1e-10)


def test_input_is_not_changed_and_gradients_flow():
    log_ratio, mask = random_batch(7)
    before = log_ratio.clone()
    assert torch.autograd.gradcheck(lambda x: future_kl(x, mask, half_life=2.0), log_ratio.requires_grad_())
    assert torch.equal(log_ratio, before)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan])
def test_half_life_must_be_positive(half_life):
    with pytest.raises(ValueError, match="half_life must be greater than 0 tokens"):
        future_kl(torch.zeros(1, 2), torch.ones(1, 2), half_life=half_life)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"log_ratio \(2, 3\) and mask \(2, 1\) must have the same shape"):
        future_kl(torch.zeros(2, 3), torch.ones(2, 1), half_life=32.0)
