"""Sizes: the paper's numbers for its recipe, parts that add up, and what a reader may ask."""

import math

import pytest
from toys import toy_unet

from bf_lib.layers import list_layers
from bf_lib.models import MODELS, meta_unet, mini_unet_config, sd15_unet_config
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import save_packed
from bf_lib.packing import packed_bytes
from bf_lib.recipe import Recipe, RecipeError, published_recipe
from bf_lib.sizes import size_report


@pytest.fixture(scope="module")
def published():
    return size_report(meta_unet(sd15_unet_config()), published_recipe())


def test_the_papers_numbers(published):
    assert published.paper_bits == pytest.approx(1.9885, abs=5e-5)
    assert published.bits_of_inner_layers == pytest.approx(2.0355, abs=5e-5)
    assert published.bits_of_what_is_left == pytest.approx(2.0551, abs=5e-5)
    assert published.half_bytes == 2 * 859_520_964
    assert published.ideal_bytes / 1e6 == pytest.approx(216.4, abs=0.05)
    assert published.removed == 27_852_800
    features = published.by("kind").loc["time features"]
    assert features["count"] == 50 * 20_160 and features.stored_bytes == 2_016_000


def test_the_files_size_is_between_the_ideal_and_the_papers_219_mb(published):
    assert published.ideal_bytes < published.stored_bytes < 219e6
    assert published.stored_bits == published.stored_bytes * 8 / 859_520_964


def test_all_parameters_are_counted_once(published):
    counted = published.by("kind")["count"]
    weights = counted["codes"] + counted["first and last layer"]
    assert weights + counted["biases and norms"] == 859_520_964 - 27_852_800 - 22_720 + 324
    scales = counted["scales"] + 324
    assert scales == 295_684
    for column in ("kind", "block"):
        assert published.by(column).stored_bytes.sum() == published.stored_bytes
        assert published.by(column).ideal_bytes.sum() == pytest.approx(published.ideal_bytes)
    assert len(published.parts.name.unique()) == len(published.parts)


def test_without_a_recipe_it_is_the_float16_file():
    report = size_report(toy_unet(), None, timesteps=None)
    tensors = report.stored_bytes - int(report.by("kind").stored_bytes["metadata"])
    assert tensors == report.half_bytes == 2 * sum(p.numel() for p in toy_unet().parameters())
    assert report.paper_bits == pytest.approx(16)
    assert report.removed == 0


@pytest.mark.parametrize("model", ["mini", MODELS["mini"], MODELS["mini"] / "unet"])
def test_a_models_name_or_folder_is_enough(model):
    expected = size_report(meta_unet(mini_unet_config()), published_recipe(), timesteps=8)
    report = size_report(model, published_recipe(), timesteps=8)
    assert report.parts.equals(expected.parts)


def test_more_levels_weigh_more_and_ends_without_levels_stay_half():
    unet = toy_unet()
    names = [layer.name for layer in list_layers(unet)]
    small, large = (size_report(unet, Recipe(dict.fromkeys(names, n))) for n in (3, 5))
    assert small.stored_bytes < large.stored_bytes
    assert small.bits_of_inner_layers == pytest.approx(math.log2(3))
    ends = small.parts[small.parts.kind == "first and last layer"]
    assert set(ends.ideal_bits) == {16.0}
    codes = small.parts[small.parts.kind == "codes"]
    assert codes.stored_bytes.tolist() == [packed_bytes(3, n) for n in codes["count"]]


def test_what_cannot_be_sized_is_refused():
    with pytest.raises(RecipeError, match="is missing"):
        size_report(toy_unet(), Recipe({"conv_in": 3}))
    with pytest.raises(ValueError, match="timesteps must be at least 1, or None, got 0"):
        size_report(toy_unet(), published_recipe(), timesteps=0)


@pytest.mark.parametrize("timesteps", [None, 3])
def test_it_is_the_size_of_the_file(timesteps, tmp_path):
    unet = toy_unet()
    levels = {layer.name: (3, 5, 9, 17, 129)[n % 5] for n, layer in enumerate(list_layers(unet))}
    recipe = Recipe(levels | {"conv_in": 257}, {"rule": "by turns"})
    steps = None if timesteps is None else range(timesteps)
    save_packed(unet, tmp_path, BitsFusionConfig(recipe, timesteps=steps))
    (file,) = tmp_path.glob("*.safetensors")
    assert size_report(unet, recipe, timesteps).stored_bytes == file.stat().st_size


def test_it_is_the_size_of_a_file_in_float16(tmp_path):
    toy_unet().half().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert size_report(toy_unet(), None, timesteps=None).stored_bytes == file.stat().st_size
