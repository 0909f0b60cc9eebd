"""The recipes of the study: within their size, and what each rule promises."""

import numpy as np
import pandas as pd
import pytest
from toys import toy_unet

from bf_lib.allocation import ImpossibleBudget
from bf_lib.layers import list_layers
from bf_lib.recipe_study import (
    LEVELS,
    Choices,
    ascending,
    at_random,
    by_optimum,
    by_rule,
    error_table,
    uniform,
    weight_error_table,
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
    return Choices.of(unet, list_layers(unet), errors, weight_errors, STEPS)


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
        # The header's length depends on the digits in it.
        assert 0.97 * size < stored(unet, recipe) <= size + 500
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


def test_a_file_that_is_too_small_is_refused(choices):
    for rule in (by_rule, by_optimum):
        with pytest.raises(ImpossibleBudget, match="the least possible"):
            rule(choices, choices.fixed + 1000)


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


def test_a_table_of_the_sweep_becomes_one_of_layers():
    rows = [("b", 3, 2.0), ("b", 5, 1.0), ("a", 3, 4.0), ("a", 5, 3.0)]
    found = error_table(pd.DataFrame(rows, columns=["layer", "levels", "mse"]), "mse")
    assert found.to_dict("index") == {"b": {3: 2.0, 5: 1.0}, "a": {3: 4.0, 5: 3.0}}
    assert list(found.index) == ["b", "a"]
