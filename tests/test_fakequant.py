"""Rounded weights that are trained: values of the grids, gradients of LSQ."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toys import toy_unet

from bf_lib.fakequant import (
    FakeQuantized,
    attach_fake_quantizer_,
    bake_weights_,
    fake_quantizers,
)
from bf_lib.grids import alternating_scale, fake_quantize
from bf_lib.layers import get_layer
from bf_lib.unbalanced import fake_quantize_unbalanced, minmax_grid, shifted_grid

CONV = "down_blocks.1.resnets.0.conv_shortcut"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def balanced(weight: Tensor, levels: int) -> FakeQuantized:
    bound = (levels - 1) // 2
    return FakeQuantized(alternating_scale(weight, levels), -bound, bound)


def halves(scale: Tensor) -> Tensor:
    return scale.half().float()


@pytest.mark.parametrize("levels", [3, 9])
@pytest.mark.parametrize("shape", [(5, 40), (4, 3, 3, 3)])
def test_the_weight_is_that_of_the_grid_with_scales_as_they_are_stored(levels, shape):
    weight = weight_of(shape)
    quantizer = balanced(weight, levels)
    torch.testing.assert_close(
        quantizer.scale, alternating_scale(weight, levels), rtol=5e-4, atol=0
    )
    assert torch.equal(quantizer.scale, halves(quantizer.scale))
    assert torch.equal(quantizer(weight), fake_quantize(weight, quantizer.scale, levels))


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("grid", [minmax_grid, shifted_grid])
def test_other_grids_have_other_bounds(grid, bits):
    weight = weight_of((6, 50)) + 0.3
    found = grid(weight, bits)
    shift = float(found.zero[0] % 1)
    low, high = -found.zero, 2**bits - 1 - found.zero
    quantizer = FakeQuantized(found.scale, low, high, shift)
    wanted = fake_quantize_unbalanced(weight, found._replace(scale=quantizer.scale), bits)
    torch.testing.assert_close(quantizer(weight), wanted)
    assert max(len(row.unique()) for row in quantizer(weight)) <= 2**bits


def by_automatic_differentiation(
    weight: Tensor, log_scale: Tensor, low: float, high: float, shift: float
) -> Tensor:
    """LSQ as it is usually written, with detached differences instead of gradients of its own."""
    scale = log_scale.exp()
    scale = scale + (halves(scale) - scale).detach()
    inside = (weight / scale - shift).clamp(low - shift, high - shift)
    return (inside + (inside.round() - inside).detach() + shift) * scale


@pytest.mark.parametrize(
    ("low", "high", "shift"), [(-1, 1, 0), (-4, 4, 0), (-2, 1, 0), (-1.5, 1.5, 0.5)]
)
@pytest.mark.parametrize("shape", [(7, 30), (4, 5, 3, 3)])
def test_the_gradients_are_those_of_lsq(low, high, shift, shape):
    weight = weight_of(shape).requires_grad_()
    quantizer = FakeQuantized(
        torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.2, low, high, shift
    )
    upstream = weight_of(shape, seed=1)
    rounded = quantizer(weight)
    rounded.backward(upstream)
    other = weight.detach().clone().requires_grad_()
    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    wanted = by_automatic_differentiation(other, log_scale, low, high, shift)
    wanted.backward(upstream)
    torch.testing.assert_close(rounded, wanted)
    torch.testing.assert_close(weight.grad, other.grad)
    assert 0 < (weight.grad == 0).float().mean() < 1  # some are beyond the range
    # exp(log_scale) is what is differentiated, and its rounding to float16 is passed through
    torch.testing.assert_close(quantizer.log_scale.grad, log_scale.grad, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", [CONV, LINEAR])
def test_a_layer_stays_what_it_is(name):
    unet = toy_unet()
    layer = get_layer(unet, name)
    weight, kind = layer.weight.detach().clone(), type(layer)
    quantizer = attach_fake_quantizer_(layer, 3)
    assert isinstance(layer, kind) and fake_quantizers(unet) == {name: quantizer}
    wanted = fake_quantize(weight, quantizer.scale, 3)
    assert torch.equal(layer.weight, wanted)
    assert get_layer(unet, name) is layer
    bake_weights_(unet)
    assert type(layer) is kind and torch.equal(layer.weight, wanted)
    assert fake_quantizers(unet) == {} and isinstance(layer.weight, nn.Parameter)


def test_a_copy_loses_its_quantizers_and_the_model_keeps_them():
    unet = toy_unet()
    quantizer = attach_fake_quantizer_(get_layer(unet, CONV), 3)
    copied = copy.deepcopy(unet)
    bake_weights_(copied)
    assert fake_quantizers(copied) == {} and fake_quantizers(unet) == {CONV: quantizer}
    assert torch.equal(get_layer(copied, CONV).weight, get_layer(unet, CONV).weight)


def test_the_scale_stays_positive_and_is_never_too_coarse():
    quantizer = balanced(weight_of((3, 8)), 3)
    with torch.no_grad():
        quantizer.log_scale -= 20
    assert (quantizer.scale == torch.finfo(torch.float16).smallest_normal).all()


def test_levels_are_those_of_balanced_grids_alone():
    assert balanced(weight_of((3, 8)), 9).levels == 9
    with pytest.raises(ValueError, match="not balanced"):
        assert FakeQuantized(torch.ones(3, 1), -2, 1).levels
    with pytest.raises(ValueError, match="not balanced"):
        assert FakeQuantized(torch.ones(3, 1), -1.5, 1.5, 0.5).levels
