"""Allocation: the paper's rule by hand, the optimum against brute force, and budgets."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bf_lib.allocation import (
    ImpossibleBudget,
    clip_bonus,
    cost_table,
    extended,
    optimum,
    paper_rule,
    random_choice,
    within_budget,
)
from bf_lib.layers import list_layers
from bf_lib.models import meta_unet, mini_unet_config

LEVELS = (3, 5, 9)


@st.composite
def problems(draw):
    """A few layers with errors of any size and order, and whole costs that rise."""
    rows = draw(st.integers(1, 4))
    value = st.floats(-10, 1e4, allow_nan=False)
    errors = draw(st.lists(st.tuples(value, value, value), min_size=rows, max_size=rows))
    rise = st.integers(1, 1000)
    costs = draw(st.lists(st.tuples(rise, rise, rise), min_size=rows, max_size=rows))
    names = [f"layer {n}" for n in range(rows)]
    tables = [
        pd.DataFrame(values, index=names, columns=LEVELS)
        for values in (errors, np.cumsum(costs, axis=1))
    ]
    span = tables[1].iloc[:, -1].sum() - tables[1].iloc[:, 0].sum()
    return *tables, int(tables[1].iloc[:, 0].sum() + draw(st.integers(0, 120)) * span // 100)


def best_of_all(errors, costs, budget):
    """The smallest sum of errors, by looking at every choice."""
    sums = []
    for choice in itertools.product(range(len(LEVELS)), repeat=len(errors)):
        rows = np.arange(len(errors))
        if costs.to_numpy()[rows, choice].sum() <= budget:
            sums.append(errors.to_numpy()[rows, choice].sum())
    return min(sums)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_optimum_is_that_of_brute_force(problem):
    errors, costs, budget = problem
    found = optimum(errors, costs, budget, gap=0)
    assert found.cost <= budget
    tolerance = 1e-5 * max(1.0, errors.abs().to_numpy().max())
    assert found.error == pytest.approx(best_of_all(*problem), abs=tolerance)
    assert found.bound <= found.error
    assert found.error - found.bound <= tolerance
    rows = [errors.loc[name, levels] for name, levels in found.choice.items()]
    assert found.error == pytest.approx(sum(rows))


@settings(deadline=None, max_examples=20)
@given(problems(), st.integers(1, 1000))
def test_a_larger_budget_is_never_worse_and_the_same_one_gives_the_same(problem, more):
    errors, costs, budget = problem
    small, large = optimum(*problem), optimum(errors, costs, budget + more)
    assert large.error <= small.error + 1e-4 * max(1.0, errors.abs().to_numpy().max())
    again = optimum(*problem)
    assert again.choice.equals(small.choice)
    # what the choice costs is budget enough for it
    exact = optimum(errors, costs, small.cost)
    assert exact.error == pytest.approx(small.error, abs=1e-4 * errors.abs().to_numpy().max())


def instance(rows: int = 60, seed: int = 0):
    """Errors and costs as of a UNet: heavy-tailed, falling fourfold and more a bit."""
    rng = np.random.default_rng(seed)
    names = [f"layer {n}" for n in range(rows)]
    first = np.exp(rng.normal(0, 3, rows))
    ratios = np.cumprod(rng.uniform(0.1, 0.5, (rows, 2)), axis=1)
    errors = np.column_stack([first, first[:, None] * ratios])
    params = pd.Series(rng.integers(100, 100_000, rows), index=names)
    costs = np.outer(params, np.log2(LEVELS)) / 8
    return *(pd.DataFrame(t, index=names, columns=LEVELS) for t in (errors, costs)), params


def test_choices_may_be_kept_apart():
    errors, costs, _ = instance()
    budget = 1.2 * costs[3].sum()
    first = optimum(errors, costs, budget)
    second = optimum(errors, costs, budget, apart_from=[first.choice], differing=12)
    third = optimum(errors, costs, budget, [first.choice, second.choice], 12)
    assert first.gap <= 1e-6
    for one, other in itertools.combinations([first, second, third], 2):
        assert (one.choice != other.choice).sum() >= 12
        assert one.error <= other.error and other.cost <= budget


def test_the_optimum_beats_the_rule_in_what_it_minimises():
    errors, costs, params = instance()
    budget = 1.3 * costs[3].sum()
    bits = errors.set_axis([1, 2], axis=1) if errors.shape[1] == 2 else errors.iloc[:, :2]
    bits = bits.set_axis([1, 2], axis=1)

    def cost(chosen):
        return sum(costs.loc[name, 2**b + 1] for name, b in chosen.items())

    for eta in (0, 0.3):
        rule = within_budget(bits, params, cost, budget, eta)
        by_rule = sum(errors.loc[name, 2**b + 1] for name, b in rule.items())
        assert optimum(errors, costs, budget).error <= by_rule


@pytest.mark.parametrize("stored", [True, False])
def test_a_budget_that_is_too_small_says_what_is_possible(stored):
    layers = list_layers(meta_unet(mini_unet_config()))
    costs = cost_table(layers, LEVELS, stored)
    least = costs[3].sum()
    errors = costs * 0 + 1.0
    with pytest.raises(ImpossibleBudget, match=f"the least possible is {least:,.0f}$"):
        optimum(errors, costs, least - 1)
    assert (optimum(errors, costs, least).choice == 3).all()
    with pytest.raises(ImpossibleBudget, match=f"the least possible is {least:,.0f}$"):
        random_choice(costs, least - 1, np.random.default_rng(0))
    params = pd.Series({layer.name: layer.params for layer in layers})
    by_bits = errors.set_axis([1, 2, 3], axis=1)
    with pytest.raises(ImpossibleBudget, match="the least possible is 256"):
        within_budget(by_bits, params, lambda bits: bits.sum(), 255)


def test_a_budget_is_kept_to_the_byte_and_the_optimum_still_proven():
    """Of millions of bytes, one too many is within the tolerance of a solver that counts these."""
    levels = [3, 5, 9]
    costs = pd.DataFrame([[1e6, 2_000_000, 2_000_001]] * 3, columns=levels)
    errors = pd.DataFrame([[9.0, 1.0, 0.5], [9.0, 1.0, 0.2], [9.0, 1.0, 0.4]], columns=levels)
    found = optimum(errors, costs, 6_000_001)
    assert found.choice.tolist() == [5, 9, 5] and found.cost == 6_000_001
    assert found.error == pytest.approx(2.2) and found.bound == pytest.approx(2.2, rel=1e-6)


def test_errors_that_are_not_numbers_are_refused():
    errors, costs, _ = instance(3)
    errors.loc["layer 1", 5] = np.nan
    with pytest.raises(ValueError, match="errors of layer 1 are NaN"):
        optimum(errors, costs, costs[9].sum())


# ---- the rule


def test_the_rule_takes_the_fewest_bits_that_pass():
    errors = pd.DataFrame(
        {1: [8.0, 8.0, 0.5, 9.0], 2: [4.0, 0.5, 4.0, 8.0], 3: [0.5, 0.25, 0.25, 7.0]},
        index=list("abcd"),
    )
    ones = pd.Series(1, index=list("abcd"))
    # c passes at 1 and not at 2: the smallest wins. d passes nowhere: one more than was tried.
    assert paper_rule(errors, ones, 1.0).to_dict() == {"a": 3, "b": 2, "c": 1, "d": 4}
    assert paper_rule(errors, ones, 0.5)["a"] == 4  # below, not at
    large = pd.Series([256, 1, 1, 1], index=list("abcd"))
    assert paper_rule(errors, large, 1.0, eta=0.5)["a"] == 1  # 8 / 16 < 1


def test_the_smallest_threshold_within_the_budget_is_found():
    errors, _, params = instance(40)
    errors = errors.set_axis([1, 2, 3], axis=1)
    bits_of = lambda chosen: float((chosen * params).sum())  # noqa: E731
    for share in (1.0, 1.4, 2.0, 3.0, 4.0):
        budget = share * params.sum()
        chosen = within_budget(errors, params, bits_of, budget)
        scores = np.unique(errors.mul(params**-0.3, axis=0))
        all_costs = [bits_of(paper_rule(errors, params, t)) for t in [*scores, np.inf]]
        assert bits_of(chosen) == max(cost for cost in all_costs if cost <= budget)


def test_the_bonus_counts_quantiles():
    drops = pd.Series(np.arange(100.0), index=[f"l{n}" for n in range(100)])
    bonus = clip_bonus(drops)
    assert bonus.value_counts().to_dict() == {0: 90, 1: 5, 2: 3, 3: 2}
    assert bonus["l99"] == 3 and bonus["l89"] == 0
    names = {"l0": 1, "l99": 1}
    errors = pd.DataFrame({1: [0.0, 0.0]}, index=list(names))
    chosen = within_budget(
        errors, pd.Series(names), lambda b: b.sum(), 9, bonus=bonus[list(names)]
    )
    assert chosen.to_dict() == {"l0": 2, "l99": 5}


# ---- tables


def test_errors_of_more_levels_follow_the_weights():
    errors = pd.DataFrame({3: [8.0], 9: [1.0]}, index=["a"])
    weights = pd.DataFrame({3: [0.2], 9: [0.04], 17: [0.01], 33: [0.0025]}, index=["a"])
    found = extended(errors, weights)
    assert list(found.columns) == [3, 9, 17, 33]
    assert found.loc["a"].tolist() == pytest.approx([8.0, 1.0, 0.25, 0.0625])


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_random_choices_fill_their_budget(seed, share):
    _, costs, _ = instance(20)
    budget = costs[3].sum() + share * (costs[9] - costs[3]).sum() + 1e-6
    chosen = random_choice(costs, budget, np.random.default_rng(seed))
    spent = sum(costs.loc[name, levels] for name, levels in chosen.items())
    assert spent <= budget
    rises = [
        costs.loc[n].diff().to_dict().get({3: 5, 5: 9}.get(v), np.inf) for n, v in chosen.items()
    ]
    assert budget - spent < min(rises)  # nothing more would fit
