"""Rounded weights that are trained: values of the grids, gradients of LSQ."""

import pytest
import torch
from torch import nn
from toys import toy_unet

from bf_lib.fakequant import FakeQuantized, attach_fake_quantizer_
from bf_lib.grids import alternating_scale, fake_quantize
from bf_lib.layers import get_layer


@pytest.mark.parametrize("levels", [3, 9])
@pytest.mark.parametrize("shape", [(5, 40), (4, 3, 3, 3)])
def test_the_weight_is_that_of_the_grid(levels, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer = FakeQuantized(weight, levels)
    torch.testing.assert_close(quantizer.scale, alternating_scale(weight, levels))
    with torch.no_grad():
        assert torch.equal(quantizer(weight), fake_quantize(weight, quantizer.scale, levels))


def test_the_gradients_are_those_of_lsq():
    scale, bound = 0.5, 1
    quantizer = FakeQuantized(torch.ones(1, 4), 3)
    with torch.no_grad():
        quantizer.log_scale.fill_(torch.tensor(scale).log())
    weight = torch.tensor([[0.2, -0.3, 3.0, -2.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    quantizer(weight).backward(upstream)
    assert torch.equal(weight.grad, torch.tensor([[1.0, 10.0, 0.0, 0.0]]))
    # inside round(w / s) - w / s, beyond the range the sign times the largest code
    of_scale = torch.tensor([[0 - 0.4, -1 + 0.6, bound, -bound]])
    wanted = (upstream * of_scale).sum() * scale  # of the logarithm of the scale
    assert float(quantizer.log_scale.grad) == pytest.approx(float(wanted), rel=1e-5)


def test_a_layer_stays_what_it_is():
    unet = toy_unet()
    name = "down_blocks.1.resnets.0.conv_shortcut"
    layer = get_layer(unet, name)
    weight, kind = layer.weight.detach().clone(), type(layer)
    quantizer = attach_fake_quantizer_(unet, name, 3)
    assert isinstance(layer, kind)
    wanted = fake_quantize(weight, quantizer.scale.detach(), 3)
    assert torch.equal(layer.weight, wanted)
    assert get_layer(unet, name) is layer
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is kind and torch.equal(layer.weight, wanted)


def test_the_scale_stays_positive():
    quantizer = FakeQuantized(torch.randn(3, 8), 3)
    with torch.no_grad():
        quantizer.log_scale -= 20
    assert (quantizer.scale > 0).all()
