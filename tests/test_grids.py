"""Grids against slow independent references and the published Gaussian errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bf_lib.grids import (
    alternating_scale,
    balanced_codes,
    bits_of_levels,
    dequantize,
    fake_quantize,
    gaussian_rate_distortion,
    levels_of_bits,
    minmax_scale,
    nominal_bits,
    optimal_scale,
    quantize,
    relative_mse,
)
from bf_lib.layers import published_bits

LEVELS = st.sampled_from([3, 5, 7, 9, 17, 33])
SEEDS = st.integers(0, 2**31)


def channels(seed: int, rows: int = 3, width: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return weight * torch.rand(rows, 1, generator=generator, dtype=torch.float64).add(1e-3)


def slow_error(row: np.ndarray, scale: float, levels: int) -> float:
    """The squared error of the nearest levels, level by level."""
    grid = [scale * code for code in range(-(levels // 2), levels // 2 + 1)]
    return sum(min((value - point) ** 2 for point in grid) for value in row)


def slow_optimum(row: np.ndarray, levels: int) -> float:
    """The least error: best codes can only change where a weight is halfway between levels."""
    halves = [k - 0.5 for k in range(1, levels // 2 + 1)]
    breaks = sorted({abs(w) / h for w, h in itertools.product(row, halves) if w} | {0.0})
    middles = [(a + b) / 2 for a, b in itertools.pairwise([*breaks, 2 * breaks[-1] + 1])]
    best = float(np.square(row).sum())
    for middle in middles:
        codes = np.clip(np.rint(row / middle), -(levels // 2), levels // 2)
        if codes.any():
            best = min(best, float(np.square(row - codes * (row @ codes) / (codes @ codes)).sum()))
    return best


def squared_error(weight, scale, levels):
    return (weight - fake_quantize(weight, scale, levels)).square().flatten(1).sum(1)


@given(SEEDS, LEVELS)
def test_the_optimal_scale_is_the_optimum_and_never_worse(seed, levels):
    weight = channels(seed)
    best = squared_error(weight, optimal_scale(weight, levels), levels)
    slow = [slow_optimum(row, levels) for row in weight.numpy()]
    reference = torch.tensor(slow, dtype=torch.float64)
    torch.testing.assert_close(best, reference, rtol=1e-9, atol=1e-15)
    for other in (minmax_scale, alternating_scale):
        assert (best <= squared_error(weight, other(weight, levels), levels) * (1 + 1e-9)).all()


@given(SEEDS, LEVELS, st.floats(0.01, 2))
def test_weights_go_to_their_nearest_level(seed, levels, scale):
    weight = channels(seed, rows=1)
    error = squared_error(weight, torch.full((1, 1), scale, dtype=torch.float64), levels)
    assert float(error) == pytest.approx(slow_error(weight[0].numpy(), scale, levels), rel=1e-9)


@given(SEEDS, LEVELS)
def test_alternating_steps_never_raise_the_error(seed, levels):
    weight = channels(seed)
    errors = [
        squared_error(weight, alternating_scale(weight, levels, steps), levels)
        for steps in range(6)
    ]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    torch.testing.assert_close(
        errors[0], squared_error(weight, minmax_scale(weight, levels), levels)
    )


def test_one_alternating_step_is_equation_5():
    weight = channels(1, rows=1)
    start = minmax_scale(weight, 5)
    codes = quantize(weight, start, 5).codes.double()
    step = (weight * codes).sum() / (codes * codes).sum()
    torch.testing.assert_close(alternating_scale(weight, 5, steps=1).squeeze(), step)


@pytest.mark.parametrize(("levels", "known"), [(3, 0.190), (5, 0.082), (9, 0.0304), (17, 0.0101)])
def test_gaussian_errors_are_the_published_ones(levels, known):
    weight = torch.randn(400, 1280, generator=torch.Generator().manual_seed(0))
    error = relative_mse(weight, fake_quantize(weight, optimal_scale(weight, levels), levels))
    assert float(error) == pytest.approx(known, rel=0.02)
    assert float(error) > gaussian_rate_distortion(bits_of_levels(levels))


@pytest.mark.parametrize("scale_of", [minmax_scale, alternating_scale, optimal_scale])
@given(seed=SEEDS, levels=LEVELS)
def test_scales_follow_the_weights(scale_of, seed, levels):
    weight = channels(seed)
    scale = scale_of(weight, levels)
    assert scale.shape == (3, 1)
    torch.testing.assert_close(scale_of(4 * weight, levels), 4 * scale)  # exact in binary
    torch.testing.assert_close(scale_of(-weight, levels), scale)
    torch.testing.assert_close(scale_of(weight.flip(1), levels), scale)
    torch.testing.assert_close(scale_of(weight[1:], levels), scale[1:])  # channels are apart
    shaped = torch.cat([weight, weight[:, :1]], dim=1).reshape(3, 3, 2, 2)
    assert scale_of(shaped, levels).shape == (3, 1, 1, 1)


@given(SEEDS, LEVELS)
def test_quantizing_twice_is_quantizing_once(seed, levels):
    weight = channels(seed)
    scale = optimal_scale(weight, levels)
    codes, kept = quantize(weight, scale, levels)
    assert kept is scale
    again = quantize(dequantize(codes, scale), scale, levels).codes
    assert torch.equal(again, codes)
    assert set(codes.unique().tolist()) <= set(balanced_codes(levels).tolist())


def test_levels_and_bits():
    assert [levels_of_bits(b) for b in range(1, 8)] == [3, 5, 9, 17, 33, 65, 129]
    assert [nominal_bits(levels_of_bits(b)) for b in range(1, 8)] == list(range(1, 8))
    assert bits_of_levels(3) == pytest.approx(1.585, abs=1e-3)
    assert quantize(torch.ones(1, 2), torch.ones(1, 1), 257).codes.dtype == torch.int16
    assert quantize(torch.ones(1, 2), torch.ones(1, 1), 255).codes.dtype == torch.int8
    large = torch.tensor([[32768.0, -32768.0]])
    assert quantize(large, torch.ones(1, 1), 65537).codes.tolist() == [[32768, -32768]]


def test_levels_may_be_of_any_integer_type():
    weight = channels(0)
    levels = levels_of_bits(published_bits().bits[0])
    assert torch.equal(optimal_scale(weight, levels), optimal_scale(weight, int(levels)))


@pytest.mark.parametrize("scale_of", [minmax_scale, alternating_scale, optimal_scale])
def test_degenerate_channels(scale_of):
    zero, one = torch.zeros(2, 5), torch.tensor([[0.7], [-0.2]])
    assert torch.equal(scale_of(zero, 3), torch.ones(2, 1))
    assert torch.equal(fake_quantize(zero, scale_of(zero, 3), 3), zero)
    torch.testing.assert_close(fake_quantize(one, scale_of(one, 3), 3), one)
    constant = torch.full((1, 6), -0.3)
    torch.testing.assert_close(fake_quantize(constant, scale_of(constant, 3), 3), constant)
    tiny = torch.full((1, 4), 1e-42)  # subnormal
    assert fake_quantize(tiny, scale_of(tiny, 3), 3).isfinite().all()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite in 1 of 1"),
        (torch.tensor([[1.0], [float("inf")]]), "the first of them channel 1"),
        (torch.zeros(0, 3), "no elements"),
        (torch.zeros(3), "shape \\(out, \\*\\)"),
    ],
)
def test_bad_weights_are_refused(weight, said):
    for scale_of in (minmax_scale, alternating_scale, optimal_scale):
        with pytest.raises(ValueError, match=said):
            scale_of(weight, 3)
    for quantizer in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=said):
            quantizer(weight, torch.ones(len(weight), 1), 3)


@pytest.mark.parametrize("levels", [1, 2, 4, 256, -3, 3.0, True, torch.tensor(3.5)])
def test_even_or_too_few_levels_are_refused(levels):
    with pytest.raises(ValueError, match="odd whole number of at least 3"):
        optimal_scale(torch.ones(1, 2), levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_weights(dtype):
    weight = channels(0).to(dtype)
    scale = optimal_scale(weight, 5)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert fake_quantize(weight, scale, 5).dtype == dtype
