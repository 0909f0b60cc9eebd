"""Plain b-bit grids: Eq. 1 written out, and what sets them apart from balanced ones."""

import pytest
import torch
from torch import Tensor

from bf_lib.grids import fake_quantize, levels_of_bits, minmax_scale, optimal_scale, relative_mse
from bf_lib.unbalanced import (
    UnbalancedGrid,
    alternating_grid,
    dequantize_unbalanced,
    fake_quantize_unbalanced,
    fixed_grid,
    minmax_grid,
    quantize_unbalanced,
    shifted_grid,
)

BITS = (1, 2, 3, 4, 8)


def gaussian(out: int = 4, n: int = 50) -> Tensor:
    return torch.randn(out, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_equation_1(bits):
    weight = gaussian(2, 20)
    grid = minmax_grid(weight, bits)
    codes = quantize_unbalanced(weight, grid, bits)
    for row in range(2):
        s, z = grid.scale[row].item(), grid.zero[row].item()
        expected = [min(max(round(w / s) + int(z), 0), 2**bits - 1) for w in weight[row].tolist()]
        assert codes[row].tolist() == expected
    assert codes.dtype == torch.uint8
    kept = dequantize_unbalanced(codes, grid)
    torch.testing.assert_close(kept, grid.scale * (codes.float() - grid.zero))
    assert torch.equal(kept, fake_quantize_unbalanced(weight, grid, bits))


def test_minmax_spans_each_channel():
    weight = torch.tensor([[-1.0, 2.0, 0.5], [1.0, 3.0, 2.0], [-4.0, -1.0, -2.0]])
    scale, zero = minmax_grid(weight, 2)
    torch.testing.assert_close(scale.flatten(), torch.tensor([1.0, 1.0, 4 / 3]))
    assert zero.flatten().tolist() == [1, 0, 3]  # zero is on each grid, one-sided or not


def test_two_bits_are_minus_two_to_one():
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    grid = fixed_grid(weight, 2)
    assert fake_quantize_unbalanced(weight, grid, 2).tolist() == [[-2.0, -1.0, 0.0, 1.0, 1.0]]


def test_one_bit_keeps_one_sign():
    weight = torch.tensor([[-2.0, -1.5, 0.0, 1.0, 2.0]])
    assert fake_quantize_unbalanced(weight, fixed_grid(weight, 1), 1).unique().tolist() == [-2, 0]


@pytest.mark.parametrize("bits", BITS[:-1])
def test_half_shifted_levels_are_odd_halves(bits):
    weight = gaussian()
    grid = shifted_grid(weight, bits)
    steps = fake_quantize_unbalanced(weight, grid, bits) / grid.scale
    halves = torch.arange(2**bits) - (2**bits - 1) / 2
    nearest = (weight / grid.scale).unsqueeze(-1) - halves
    torch.testing.assert_close(steps, halves[nearest.abs().argmin(-1)], rtol=1e-5, atol=1e-5)


def test_one_half_shifted_bit_is_the_sign_times_the_mean_magnitude():
    weight = gaussian(8, 4000)
    grid = alternating_grid(weight, 1, shifted_grid(weight, 1), steps=3)
    kept = fake_quantize_unbalanced(weight, grid, 1)
    torch.testing.assert_close(kept, weight.sign() * weight.abs().mean(1, keepdim=True))
    assert relative_mse(weight, kept) == pytest.approx(1 - 2 / torch.pi, rel=0.02)


def test_alternating_steps_never_raise_the_error():
    weight = gaussian(20, 100)
    for bits in BITS[:-1]:
        grids = [alternating_grid(weight, bits, fixed_grid(weight, bits), k) for k in range(8)]
        errors = [
            relative_mse(weight, fake_quantize_unbalanced(weight, g, bits), per_channel=True)
            for g in grids
        ]
        for i in range(7):
            assert (errors[i + 1] <= errors[i] + 1e-7).all()
        assert torch.equal(grids[0].scale, fixed_grid(weight, bits).scale)


@pytest.mark.parametrize("bits", BITS[:4])
def test_a_level_more_lowers_the_error(bits):
    weight = gaussian(50, 1000)
    plain = alternating_grid(weight, bits, fixed_grid(weight, bits), steps=50)
    levels = levels_of_bits(bits)
    balanced = fake_quantize(weight, optimal_scale(weight, levels), levels)
    unbalanced = fake_quantize_unbalanced(weight, plain, bits)
    assert relative_mse(weight, balanced) < relative_mse(weight, unbalanced)


def test_zeros_are_exact_and_small_types_are_kept():
    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    for grid in (minmax_grid(weight, 2), fixed_grid(weight, 2)):
        assert grid.scale.flatten().tolist() == [1.0, 1.0]
        fitted = alternating_grid(weight, 2, grid)
        assert fake_quantize_unbalanced(weight, fitted, 2).equal(weight)
    assert minmax_scale(weight, 5).dtype == torch.float32


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_bits_must_fit_a_byte(bits):
    for call in (minmax_grid, fixed_grid):
        with pytest.raises(ValueError, match=rf"bits must be in 1..8, got {bits}"):
            call(gaussian(), bits)


def test_bad_weights_are_refused():
    weight = torch.tensor([[1.0, float("nan")]])
    grid = UnbalancedGrid(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_unbalanced(weight, grid, 2)


def test_bad_scales_and_steps_are_refused():
    weight = torch.ones(2, 3)
    grid = UnbalancedGrid(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="scale must be positive"):
        quantize_unbalanced(weight, grid, 2)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        alternating_grid(weight, 2, fixed_grid(weight, 2), steps=-1)
