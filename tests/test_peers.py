"""How other systems store a UNet, and that none of them stops the others."""

import os
import time

import pytest
import torch
from toys import toy_unet

from bf_lib.decoded_files import palette_of
from bf_lib.layers import all_layers, list_layers
from bf_lib.peers import (
    Peer,
    all_peers,
    gguf,
    half_precision,
    installed,
    ours,
    palettes,
    quanto,
    sdnq,
    torchao,
)
from bf_lib.peers_study import COLUMNS, stored_by
from bf_lib.recipe import Recipe

RECIPE = Recipe({layer.name: 3 for layer in list_layers(toy_unet())})
PARAMETERS = sum(parameter.numel() for parameter in toy_unet().parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("original")
    toy_unet().save_pretrained(place)
    return place


def measured(folder, peers, **options):
    table = stored_by(folder, peers, latents=8, repeats=1, **options)
    assert list(table) == COLUMNS
    assert list(table.peer) == [peer.name for peer in peers]
    return table.set_index("peer")


# ---- what is measured


def test_sizes_and_errors_are_those_of_files(folder):
    peers = [half_precision(), palettes(), ours(RECIPE, timesteps=[481]), ours(RECIPE, "zstd")]
    table = measured(folder, peers)
    assert list(table.error) == ["none"] * 4
    assert table.stored_bits.tolist() == pytest.approx(8e6 * table.file_mb / PARAMETERS)
    assert list(table.conv) == ["left in fp16"] + ["quantized"] * 3
    assert list(table.layers) == [0, 282, 256, 256]
    assert list(table.in_memory) == ["decoded"] * 2 + ["packed"] * 2
    assert (table[["load_s", "step_s", "full_step_s"]] > 0).all(axis=None)
    # The names of its tensors weigh something in so small a file.
    bits = table.stored_bits
    assert 16 < bits["fp16"] < 18 and 2 < bits["palettes, 2 bits"] < 5
    assert bits.filter(like="bf_lib").between(2, 7).all()
    errors = table.relative_error
    assert errors["fp16"] < 0.01 < errors.drop("fp16").min() <= errors.max() < 1


# ---- failures


def nothing(folder):
    raise AssertionError("nothing was stored")


def raises(unet, folder):
    raise ValueError("no room\nfor this")


def hangs(unet, folder):
    time.sleep(600)


def dies(unet, folder):
    os._exit(7)


MISSING = Peer("missing", raises, nothing, package="no_such.package")


def test_failures_are_in_their_rows_only(folder):
    failing = [Peer("raises", raises, nothing), Peer("dies", dies, nothing), MISSING]
    table = measured(folder, [*failing, ours(RECIPE, timesteps=[1])])
    assert table.error["raises"] == "ValueError: no room for this"
    assert table.error["dies"] == "its process ended with code 7"
    assert table.error["missing"] == "not installed"
    assert table.error["bf_lib packed"].startswith("UncachedStep")
    assert table.file_mb.notna().tolist() == [False] * 3 + [True]


def test_a_peer_that_does_not_end_is_ended(folder):
    table = measured(folder, [Peer("hangs", hangs, nothing), MISSING], timeout=1)
    assert list(table.error) == ["no answer within 1 s", "not installed"]


def test_packages_are_looked_for_without_an_import():
    assert installed(half_precision())
    assert installed(Peer("here", raises, nothing, package="bf_lib.peers"))
    assert not installed(Peer("not here", raises, nothing, package="bf_lib.no_such"))


def test_all_peers_have_names_of_their_own():
    names = [peer.name for peer in all_peers(RECIPE)]
    assert len({*names}) == len(names) == 19
    assert names[-2:] == ["bf_lib packed", "bf_lib zstd"]


# ---- palettes


def test_palettes_are_local_optima():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 7, 3, 3, generator=generator) ** 3
    palette, indices = palette_of(weight)
    assert indices.shape == weight.shape
    distances = (weight[..., None] - palette).abs()
    assert torch.equal(distances.argmin(-1), indices.long())
    for n, value in enumerate(palette):
        assert weight[indices == n].double().mean().item() == pytest.approx(value.item())


@pytest.mark.parametrize("values", [[0.0], [-1.0, 2.0], [-3.0, -1.0, 0.5, 4.0]])
def test_few_values_are_kept(values):
    weight = torch.tensor(values).repeat_interleave(torch.arange(5, 5 + len(values)))
    palette, indices = palette_of(weight)
    assert torch.equal(palette[indices.int()].float(), weight)


def test_palettes_come_back_from_files(tmp_path):
    unet, peer = toy_unet(), palettes()
    peer.store(unet, tmp_path)
    loaded = peer.load(tmp_path)
    for layer in all_layers(unet)[::10]:
        weight = unet.get_submodule(layer.name).weight
        palette, indices = palette_of(weight)
        found = loaded.get_submodule(layer.name).weight
        assert len(found.unique()) <= 4
        assert torch.equal(found, palette.half().float()[indices.int()]), layer.name
    assert torch.equal(loaded.conv_in.bias, unet.conv_in.bias.half().float())


# ---- optional packages


@pytest.mark.parametrize(
    ("peer", "conv"),
    [
        (quanto(2), "quantized"),
        (sdnq(2, -1), "% quantized"),
        (torchao("intx", 2), "left in fp16"),
        (gguf("TQ1_0", rearranged=True), "% quantized"),
        (gguf("TQ2_0"), "left in fp16"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_packages_store_and_load(folder, peer, conv):
    pytest.importorskip(peer.package)
    row = measured(folder, [peer]).loc[peer.name]
    assert row.error == "none"
    assert row.conv.endswith(conv)
    assert 2 < row.stored_bits < 20
    assert row.relative_error < 2
