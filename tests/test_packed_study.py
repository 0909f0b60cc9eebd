"""What packed UNets cost: bits against entropy, and that what is timed is what is meant."""

import numpy as np
import pytest
import torch
from toys import toy_unet

from bf_lib import packed_bits, packed_study
from bf_lib.layers import list_layers
from bf_lib.models import load_pipeline
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_layers import packed_layers
from bf_lib.packed_unets import load_packed, pack_, save_packed
from bf_lib.recipe import Recipe, published_recipe
from bf_lib.sizes import size_report

SMALL = (32, 64, 128, 128)  # as those of SD-v1.5, so that there are the same shortcuts


@pytest.fixture(scope="module")
def config():
    levels = {layer.name: (3, 5, 9, 129)[n % 4] for n, layer in enumerate(list_layers(toy_unet()))}
    return BitsFusionConfig(Recipe(levels), timesteps=[1, 500])


def test_the_entropy_of_codes():
    assert packed_bits.entropy(torch.tensor([-1, 0, 1, 2] * 5)) == pytest.approx(2)
    assert packed_bits.entropy(torch.tensor([7, 7, 7])) == 0
    half, quarter = torch.zeros(2), torch.tensor([-3, 5])
    assert packed_bits.entropy(torch.cat([half, quarter])) == pytest.approx(1.5)


def test_codes_cost_no_less_than_their_entropy_and_no_more_than_fields():
    costs = packed_bits.code_costs((3, 5, 9, 17), count=1 << 16)
    assert (costs.log2 <= costs.words).all() and (costs.words < costs.fields).all()
    assert (costs.entropy <= costs.zstd).all() and (costs.zstd < costs.words).all()
    assert costs.zstd.values == pytest.approx(costs.entropy.values, rel=0.03)


def test_costs_of_layers_are_those_of_their_bytes(config):
    unet = toy_unet()
    pack_(unet, config)
    costs = packed_bits.layer_costs(unet).set_index("name")
    for name, layer in packed_layers(unet).items():
        assert costs.words[name] * costs.weights[name] / 8 == pytest.approx(layer.words.nbytes)
        assert costs.entropy[name] <= costs.log2[name] + 1e-9


def test_a_rounded_unet_computes_what_a_packed_one_does(config):
    packed, generator = toy_unet(), torch.Generator().manual_seed(0)
    rounded = packed_study.rounded_unet(packed, config)
    pack_(packed, config)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, packed.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        ours, theirs = (
            unet(x, 500, encoder_hidden_states=text).sample for unet in (packed, rounded)
        )
    assert torch.equal(ours, theirs) and not packed_layers(rounded)


def test_gaussian_weights_keep_the_size_of_what_goes_through():
    unet = packed_study.gaussian_unet(SMALL)
    with torch.no_grad():
        out = unet(torch.randn(1, 4, 8, 8), 500, encoder_hidden_states=torch.randn(1, 7, 768))
    assert 0.1 < float(out.sample.std()) < 10
    published_recipe().check(unet)


def test_saved_costs_are_those_of_the_files(tmp_path):
    unet = packed_study.gaussian_unet(SMALL)
    report = size_report(unet, published_recipe(), timesteps=50)
    saved = packed_study.saved_costs(unet, published_recipe(), tmp_path).set_index("tier")
    for tier in ("packed", "zstd"):
        size = sum(file.stat().st_size for file in (tmp_path / tier).glob("*.safetensors"))
        assert saved.mb[tier] == size / 1e6
        assert saved.stored_bits[tier] == 8 * size / report.parameters
    assert saved.mb["zstd"] < saved.mb["packed"] and saved.differ.sum() == 0
    unet.mid_block.resnets[0].conv1.weight.data.neg_()
    assert packed_study._differing(load_packed(tmp_path / "zstd"), unet) == 1


def test_speeds_are_timed_with_so_many_threads_and_no_others():
    before = torch.get_num_threads()
    speeds = packed_study.decode_speeds((3, 9), threads=1, count=1000)
    assert torch.get_num_threads() == before
    rates = speeds[["codes_per_s", "weights_per_s", "written_per_s"]]
    assert (rates > 0).all(axis=None) and np.isfinite(rates).all(axis=None)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_mini_comes_back_from_a_file_bit_for_bit(compress, tmp_path):
    unet, generator = load_pipeline("mini").unet, torch.Generator().manual_seed(0)
    levels = published_recipe().levels
    config = BitsFusionConfig(Recipe(levels), timesteps=[1, 500], compress=compress)
    rounded = packed_study.rounded_unet(unet, config)
    save_packed(unet, tmp_path, config)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 16, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        ours, theirs = (
            model(x, 500, encoder_hidden_states=text).sample
            for model in (load_packed(tmp_path), rounded)
        )
    assert torch.equal(ours, theirs)
