"""Reconstruction block by block: splits, roundings that become whole, and errors that fall."""

import pytest
import torch
from toys import toy_pipeline

from bf_lib.fakequant import bake_weights_
from bf_lib.forms import Form
from bf_lib.layers import list_layers
from bf_lib.reconstruction import (
    Reconstruction,
    Rounding,
    calibration,
    reconstruct,
    shortcut_splits,
)
from bf_lib.sampling import Sampler
from bf_lib.unbalanced import alternating_grid, fake_quantize_unbalanced, minmax_grid

SAMPLER = Sampler(steps=4, guidance=2.0, batch=3)


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.fixture(scope="module")
def inputs(pipe):
    return calibration(pipe, ["one", "two", "three"], SAMPLER, count=12)


def test_inputs_of_calibration_are_those_of_all_steps(pipe, inputs):
    assert len(inputs) == 12 and inputs.x.shape == (12, 4, 8, 8)
    counts = inputs.t.unique(return_counts=True)[1]
    assert counts.tolist() == [3, 3, 3, 3]
    with torch.no_grad():
        assert inputs.run(pipe.unet, slice(0, 2)).shape == (2, 4, 8, 8)


def test_weights_are_rounded_up_or_down_and_no_further():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    rounding = Rounding(weight, 4)
    # undecided, it is the weight itself, but for what is beyond the range
    within = (weight >= rounding.low * rounding.scale) & (weight <= rounding.high * rounding.scale)
    torch.testing.assert_close(rounding(weight)[within], weight[within], rtol=0, atol=2e-3)
    assert rounding.undecided(2.0) > 0
    with torch.no_grad():
        rounding.logits.copy_(rounding.logits.sign() * 10)
    assert float(rounding.undecided(2.0).detach()) == 0
    rounding.whole = True
    grid = alternating_grid(weight, 4, minmax_grid(weight, 4))
    scale = grid.scale.half().float()
    wanted = fake_quantize_unbalanced(weight, grid._replace(scale=scale), 4)
    torch.testing.assert_close(rounding(weight), wanted)  # to nearest, as nothing was learnt


def test_parts_of_a_weight_have_scales_of_their_own():
    weight = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, 6:] *= 100
    whole, split = Rounding(weight, 4), Rounding(weight, 4, split=6)
    for rounding in (whole, split):
        rounding.whole = True
    small = weight[:, :6]
    errors = [(r(weight)[:, :6] - small).square().mean() for r in (whole, split)]
    assert errors[1] < 0.05 * errors[0]


def test_splits_are_where_skips_are_joined(pipe):
    splits = shortcut_splits(pipe.unet)
    for name, width in splits.items():
        block = pipe.unet.get_submodule(name.rpartition(".")[0])
        assert 0 < width < block.in_channels and block.conv1.in_channels == block.in_channels
    assert splits["up_blocks.0.resnets.0.conv1"] == 32  # of the middle block
    assert splits["up_blocks.3.resnets.0.conv1"] == 16  # of the block below, which is wider


BLOCKS = ("down_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0", "conv_in")


def test_learning_is_better_than_rounding_to_nearest(pipe, inputs):
    unet = pipe.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    nearest, learnt = (
        reconstruct(unet, inputs, 3, steps, batch=4, only=BLOCKS) for steps in (0, 100)
    )
    with torch.no_grad():
        wanted = inputs.run(unet, slice(None))
        errors = [(inputs.run(u, slice(None)) - wanted).square().mean() for u in (nearest, learnt)]
        assert 0 < errors[1] < 0.8 * errors[0]
        bake_weights_(learnt)
        again = (inputs.run(learnt, slice(None)) - wanted).square().mean()
    assert again == errors[1]
    changed = 0
    for layer in list_layers(unet):
        weight, old = learnt.get_submodule(layer.name).weight, before[f"{layer.name}.weight"]
        if layer.name.startswith(BLOCKS):
            assert max(len(row.unique()) for row in weight.flatten(1)) <= 2 * 8
            changed += 1
        else:
            assert torch.equal(weight, old)
    assert changed > 8
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_scales_of_both_parts_of_a_split_are_counted(pipe):
    size = Reconstruction(bits=4).size(pipe.unet, 50)
    plain = Form(kind="plain", bits=4).size(pipe.unet, 50)
    channels = sum(pipe.unet.get_submodule(n).out_channels for n in shortcut_splits(pipe.unet))
    assert 8 * (size.stored_bytes - plain.stored_bytes) == pytest.approx(20 * channels, rel=0.01)
    assert 4 < size.paper_bits < 6
