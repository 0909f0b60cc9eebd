"""Recipes: what they refuse, what a file keeps, and the paper's own."""

import json

import pytest
from toys import toy_unet

from bf_lib.layers import list_layers
from bf_lib.models import meta_unet, mini_unet_config, sd15_unet_config
from bf_lib.recipe import Recipe, RecipeError, published_recipe


@pytest.fixture(scope="module")
def unet():
    return meta_unet(sd15_unet_config())


def written(path, entries: list[tuple[str, object]], **other: object):
    """Writes entries as JSON, even those of one name."""
    levels = ", ".join(f"{json.dumps(name)}: {json.dumps(count)}" for name, count in entries)
    top = json.dumps({"format": "bitsfusion recipe 1", **other})
    path.write_text(f'{top[:-1]}, "levels": {{{levels}}}}}')
    return path


def test_the_published_recipe_is_for_all_unets_of_its_topology(unet):
    recipe = published_recipe()
    assert len(recipe.levels) == 258
    assert recipe.levels["conv_in"] == recipe.levels["conv_out"] == 257
    counts = sorted(set(recipe.levels.values()))
    assert counts == [3, 5, 9, 17, 33, 65, 129, 257]
    for fitting in (unet, meta_unet(mini_unet_config()), toy_unet()):
        recipe.check(fitting)


def test_a_file_gives_back_what_was_saved(tmp_path, unet):
    made = {"from": "a sweep", "budget": {"MB": 219.5}, "seeds": [1, 2], "notes": []}
    recipe = Recipe(published_recipe().levels, made)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json", unet) == recipe
    again = tmp_path / "again.json"
    Recipe.load(tmp_path / "recipe.json").save(again)
    assert again.read_bytes() == (tmp_path / "recipe.json").read_bytes()


def test_a_recipe_cannot_be_changed():
    levels = {"a": 3}
    recipe = Recipe(levels)
    levels["a"] = 4
    assert recipe.levels["a"] == 3
    with pytest.raises(TypeError):
        recipe.levels["a"] = 5


def test_one_error_lists_all_that_is_wrong_with_a_file(tmp_path, unet):
    entries = [(layer.name, 3) for layer in list_layers(unet)]
    gone, even = entries[7][0], entries[9][0]
    entries[7] = ("mid_block.attentions.0.proj_inn", 3)
    entries[9] = (even, 4)
    entries += [entries[0], ("time_embedding.linear_1", 3)]
    path = written(tmp_path / "recipe.json", entries)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, unet)
    assert str(caught.value).splitlines()[0] == f"{path}: the recipe has 5 problems:"
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        f"{entries[0][0]!r} is there twice",
        f"{even!r} has 4 levels, not an odd whole number of at least 3",
        "'mid_block.attentions.0.proj_inn' is unknown, perhaps 'mid_block.attentions.0.proj_in'",
        "'time_embedding.linear_1' is not quantized: its output is pre-computed",
        f"{gone!r} is missing",
    }


@pytest.mark.parametrize("count", [4, 1, 0, -3, 3.0, "3", None, True])
def test_levels_are_odd_whole_numbers(count, tmp_path):
    with pytest.raises(RecipeError, match="not an odd whole number"):
        Recipe({"a": count})
    with pytest.raises(RecipeError, match="not an odd whole number"):
        Recipe.load(written(tmp_path / "r.json", [("a", count)]))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"levels": {"a": 3}}', "\xff"])
def test_what_is_not_a_recipe_is_said_to_be_none(text, tmp_path):
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match="r.json is not"):
        Recipe.load(tmp_path / "r.json")


def test_the_ends_may_be_left_out_and_no_other_layer(unet):
    levels = {layer.name: 5 for layer in list_layers(unet)}
    Recipe(levels).check(unet)
    del levels["mid_block.resnets.0.conv1"]
    with pytest.raises(RecipeError, match="1 problem:\n.*conv1' is missing"):
        Recipe(levels).check(unet)


def test_bits_of_a_recipe():
    assert Recipe.of_bits({"a": 1, "b": 3}).levels == {"a": 3, "b": 9}
    assert Recipe({"a": 3}).bits() == {"a": pytest.approx(1.585, abs=1e-3)}
