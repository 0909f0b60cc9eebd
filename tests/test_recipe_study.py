"""The recipes of the study: within their size, and what each rule promises."""

import numpy as np
import pandas as pd
import pytest
from toys import toy_unet

from bf_lib.allocation import ImpossibleBudget, extended
from bf_lib.layers import list_layers
from bf_lib.recipe import Recipe
from bf_lib.recipe_study import (
    LEVELS,
    Choices,
    agreement_table,
    ascending,
    at_random,
    by_optimum,
    by_rule,
    error_table,
    mean_bits,
    uniform,
    weight_error_table,
    weighted_pair,
)
from bf_lib.sizes import size_report

STEPS = 8


@pytest.fixture(scope="module")
def unet():
    return toy_unet()


@pytest.fixture(scope="module")
def weight_errors(unet):
    return weight_error_table(unet, list_layers(unet))


@pytest.fixture(scope="module")
def choices(unet, weight_errors):
    sizes = np.exp(np.random.default_rng(0).normal(0, 3, len(weight_errors)))
    errors = weight_errors[[3, 5, 9]].mul(sizes, axis=0)
    return Choices.of(unet, list_layers(unet), extended(errors, weight_errors), STEPS)


def stored(unet, recipe) -> int:
    return size_report(unet, recipe, STEPS).stored_bytes


def test_recipes_of_a_size_fill_a_file_of_that_size(choices, unet):
    size = stored(unet, uniform(choices, 5))
    optimum, proof = by_optimum(choices, size)
    drops = pd.Series(np.arange(256.0), index=choices.errors.index)
    for recipe in (
        *(optimum, by_rule(choices, size), by_rule(choices, size, eta=0, drops=drops)),
        *at_random(choices, size, 2, seed=0),
    ):
        recipe.check(unet)
        assert 0.96 * size < stored(unet, recipe) <= size
    assert proof.gap <= 1e-6
    assert choices.predicted(optimum) == pytest.approx(proof.error)
    assert choices.predicted(optimum) <= choices.predicted(by_rule(choices, size))
    assert choices.predicted(optimum) < choices.predicted(uniform(choices, 5))


def test_random_recipes_differ_and_come_again(choices, unet):
    size = stored(unet, uniform(choices, 5))
    first, second = at_random(choices, size, 2, seed=0)
    assert first != second
    assert at_random(choices, size, 2, seed=0) == [first, second]


def test_recipes_may_be_kept_apart(choices, unet):
    size = stored(unet, uniform(choices, 5))
    first, _ = by_optimum(choices, size)
    second, _ = by_optimum(choices, size, [first], differing=25)
    assert sum(first.levels[name] != second.levels[name] for name in first.levels) >= 25


def test_layers_with_large_drops_get_bits(choices, unet):
    size = stored(unet, uniform(choices, 9))
    drops = pd.Series(0.0, index=choices.errors.index)
    drops.iloc[7] = 1.0
    plain, refined = by_rule(choices, size), by_rule(choices, size, drops=drops)
    name = drops.index[7]
    assert refined.levels[name] > plain.levels[name]


def test_errors_beyond_the_sweep_follow_the_weights(choices, weight_errors):
    assert list(choices.errors.columns) == list(LEVELS)
    ratio = choices.errors[17] / choices.errors[9]
    pd.testing.assert_series_equal(ratio, weight_errors[17] / weight_errors[9], check_names=False)
    assert (weight_errors[129] < weight_errors[3]).all()


def test_the_least_sensitive_layers_come_first(choices):
    parts = ascending(choices, 3, (1, 10, 256))
    assert [len(part.levels) for part in parts] == [1, 10, 256]
    chosen = choices.errors.loc[list(parts[1].levels), 3]
    assert chosen.max() <= choices.errors[3].drop(chosen.index).min()


def test_a_table_of_the_sweep_becomes_one_of_layers(unet):
    first, second, third = list_layers(unet)[:3]
    rows = [(second, 3, 2.0), (second, 5, 1.0), (first, 3, 4.0), (first, 5, 3.0)]
    sweep = pd.DataFrame([(layer.name, *rest) for layer, *rest in rows])
    sweep.columns = ["layer", "levels", "mse"]
    found = error_table(sweep, "mse", [first, second, third])
    assert list(found.index) == [first.name, second.name, third.name]
    assert list(found.columns) == [3, 5]
    # The third was not swept, and counts as harmless.
    assert found.to_numpy().tolist() == [[4.0, 3.0], [2.0, 1.0], [0.0, 0.0]]


def test_two_metrics_are_weighted_by_their_size():
    mse = pd.DataFrame({3: [2.0, 6.0]}, index=["a", "b"])  # of mean size 4
    drops = pd.DataFrame({3: [-0.1, 0.4]}, index=["a", "b"])  # of mean 0.2, without the luck
    assert weighted_pair(mse, drops, 0.0)[3].tolist() == [0.5, 1.5]
    assert weighted_pair(mse, drops, 1.0)[3].tolist() == pytest.approx([0, 2])  # no negative drop
    assert weighted_pair(mse, drops, 0.25)[3].tolist() == pytest.approx([0.375, 1.625])


def test_recipes_are_compared_by_layer_role_and_block(unet):
    layers = list_layers(unet)
    place = {layer.name: n for n, layer in enumerate(layers)}
    rising = Recipe({name: 3 if n < 128 else 17 for name, n in place.items()})
    falling = Recipe({name: 17 if n < 128 else 3 for name, n in place.items()})
    recipes = {"rising": rising, "again": rising, "falling": falling}
    found = agreement_table(layers, recipes, "rising").set_index(["recipe", "over"])
    assert set(found.index.get_level_values("over")) == {"name", "role", "block"}
    assert found.spearman.loc["again"].tolist() == pytest.approx([1, 1, 1])
    assert found.spearman.loc["falling"].tolist() == pytest.approx([-1, -1, -1])
    assert found["count"].loc["again", "name"] == 256
    bits = mean_bits(layers, recipes, "block").set_index("block")
    assert (bits.rising + bits.falling).tolist() == pytest.approx([5] * len(bits))
    first = [layer for layer in layers if layer.block == "mid"]
    share = np.mean([place[layer.name] >= 128 for layer in first])
    assert bits.rising["mid"] == pytest.approx(1 + 3 * share)


def test_a_threshold_is_solved_for_the_papers_bits(choices, unet):
    counted = Choices.of(unet, list_layers(unet), choices.errors, STEPS, stored=False)
    weights = size_report(unet, uniform(choices, 3), STEPS).weights
    for bits in (2.2, 3.0):
        recipe = by_rule(counted, round(bits * weights / 8))
        assert bits - 0.1 < size_report(unet, recipe, STEPS).paper_bits <= bits


def test_choices_may_be_fewer(choices, unet):
    size = stored(unet, uniform(choices, 5))
    fewer, _ = by_optimum(choices.up_to(17), size)
    assert max(fewer.levels.values()) <= 17 < max(by_optimum(choices, size)[0].levels.values())


def test_an_impossible_size_says_the_smallest_file(choices, unet):
    least = stored(unet, uniform(choices, 3))
    for ask in (by_rule, by_optimum, lambda c, size: at_random(c, size, 1, 0)):
        with pytest.raises(ImpossibleBudget, match="budget of 1,000 bytes") as caught:
            ask(choices, 1000)
        said = int(str(caught.value).split()[-1].replace(",", ""))
        assert least <= said <= least + 256 * 12
