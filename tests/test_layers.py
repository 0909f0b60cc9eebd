"""Layers: which are quantized, what they are called, in what order they run."""

import json

import pytest
import torch
from torch import nn
from toys import toy_unet

from bf_lib.layers import all_layers, get_layer, in_published_order, list_layers, published_bits
from bf_lib.models import MODELS, meta_unet, mini_unet_config, sd15_unet_config


def test_sd15_has_the_papers_layers():
    unet = meta_unet(sd15_unet_config())
    layers = list_layers(unet)
    assert unet.num_parameters() == 859_520_964
    assert len(all_layers(unet)) == 282
    assert len(layers) == 256
    assert sum(layer.params for layer in layers) == 831_201_280
    recipe = published_bits()
    names = [layer.name for layer in in_published_order(layers)]
    assert names == recipe.name.tolist()[:256]
    assert [layer.params for layer in in_published_order(layers)] == recipe.params.tolist()[:256]


def test_mini_has_the_same_layers_as_sd15():
    mini, sd15 = (list_layers(meta_unet(c())) for c in (mini_unet_config, sd15_unet_config))
    assert [(a.name, a.role, a.kind) for a in mini] == [(b.name, b.role, b.kind) for b in sd15]
    shipped = json.loads((MODELS["mini"] / "unet" / "config.json").read_text())
    wanted = meta_unet(mini_unet_config()).config
    assert {k: v for k, v in shipped.items() if not k.startswith("_")} == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in wanted.items()
        if not k.startswith("_")
    }


def test_every_layer_is_listed_once_or_excluded_with_a_reason():
    unet = toy_unet()
    kinds = (nn.Linear, nn.Conv2d)
    names = {name for name, module in unet.named_modules() if isinstance(module, kinds)}
    layers = all_layers(unet)
    assert sorted(layer.name for layer in layers) == sorted(names)
    left_out = [layer for layer in layers if layer.excluded]
    assert len(left_out) == 26
    assert all(layer.depth is None for layer in left_out)


def test_depth_is_the_order_in_which_the_forward_pass_runs_layers():
    unet = toy_unet()
    ran = []
    for layer in list_layers(unet):
        get_layer(unet, layer.name).register_forward_hook(
            lambda *_, name=layer.name: ran.append(name)
        )
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), torch.tensor(5), torch.zeros(1, 10, 16))
    # A residual block runs its shortcut after its convolutions, as it is listed.
    assert ran == [layer.name for layer in list_layers(unet)]
    assert [layer.depth for layer in list_layers(unet)] == list(range(256))


def test_shapes_are_those_of_the_weights():
    unet = toy_unet()
    for layer in all_layers(unet):
        weight = get_layer(unet, layer.name).weight
        assert layer.shape == tuple(weight.shape)
        assert layer.params == weight.numel()
        assert layer.out_channels == len(weight)


@pytest.mark.parametrize(
    ("name", "role", "block"),
    [
        ("down_blocks.1.resnets.0.conv_shortcut", "resnet.conv_shortcut", "down1"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "cross_attn.to_k", "mid"),
        ("up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj", "ff.in", "up3"),
        ("up_blocks.0.upsamplers.0.conv", "upsample", "up0"),
        ("down_blocks.0.attentions.1.proj_in", "proj_in", "down0"),
    ],
)
def test_roles_and_blocks(name, role, block):
    (layer,) = [layer for layer in list_layers(toy_unet()) if layer.name == name]
    assert (layer.role, layer.block) == (role, block)


class Adapted(nn.Module):
    """A layer as PEFT wraps it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)


def test_adapters_do_not_change_the_list():
    unet = toy_unet()
    before = list_layers(unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    inner, attention.to_q = attention.to_q, Adapted(attention.to_q)
    assert list_layers(unet) == before
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert get_layer(unet, name) is inner


def test_an_unknown_layer_is_named_with_the_closest_known_one():
    with pytest.raises(ValueError, match=r"no conv or linear layer 'conv_inn'; did you mean"):
        get_layer(toy_unet(), "conv_inn")
