"""The tables of notebook 02, against a search that tries everything."""

import numpy as np
import pytest
import torch

from bf_lib import grid_study
from bf_lib.grid_study import (
    channel_example,
    convergence,
    gaussian_errors,
    grid_errors,
    optimum_excess,
)
from bf_lib.grids import alternating_scale, fake_quantize, optimal_scale, relative_mse


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "conv": torch.randn(4, 3, 3, 3, generator=generator),
        "linear": torch.randn(6, 20, generator=generator).pow(3),  # heavy tails
    }


def test_each_layer_has_a_row_for_each_method_and_bit_width(weights):
    table = grid_errors(weights.items(), (1, 2, 3))
    assert len(table) == 2 * 3 * 6
    levels = table.groupby("method")["levels"].unique().map(sorted)
    assert levels["plain minmax"] == levels["plain alternating"] == [2, 4, 8]
    assert levels["shifted alternating"] == [2, 4, 8]
    assert levels["minmax"] == levels["alternating"] == levels["optimal"] == [3, 5, 9]


def test_no_scale_beats_the_optimum_and_a_fine_search_finds_it(weights):
    table = grid_errors(weights.items(), (1, 2)).pivot(
        index=["layer", "levels"], columns="method", values="relative_mse"
    )
    balanced = table.dropna(subset="optimal")
    assert (balanced.optimal <= balanced.alternating + 1e-7).all()
    assert (balanced.alternating <= balanced.minmax + 1e-7).all()
    for (name, levels), row in balanced.iterrows():
        channels = weights[name].flatten(1)
        errors = 0.0
        for channel in channels:
            tried = torch.linspace(0.01, 1, 3000)[:, None] * channel.abs().max() * 2
            codes = (channel / tried).round().clamp(-(levels // 2), levels // 2)
            errors += (codes * tried - channel).square().sum(1).min()
        assert row.optimal == pytest.approx(float(errors / channels.square().sum()), rel=1e-3)


def test_a_layer_that_a_grid_represents_exactly_has_no_excess():
    table = convergence([("signs", torch.tensor([[1.0, -1.0, 0.0]]))], (3,), (0, 10))
    assert table.excess.tolist() == [0.0, 0.0]
    assert table.settled.tolist() == [1.0, 1.0]


def test_the_excess_falls_to_zero_or_stops_above_it(weights):
    table = convergence(weights.items(), (3, 9), (0, 1, 10))
    assert (table.excess > -1e-6).all()
    by_step = table.pivot(index=["layer", "levels"], columns="steps", values="excess")
    assert (by_step[0] >= by_step[1] - 1e-6).all()
    assert (by_step[1] >= by_step[10] - 1e-6).all()


def test_channels_have_converged_when_another_step_changes_nothing():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    table = convergence([("linear", weight)], (5,), (0, 2, 4, 50)).set_index("steps")
    for step, settled in table.settled.items():
        before, after = (
            (weight / alternating_scale(weight, 5, count)).round().clamp(-2, 2)
            for count in (step, step + 1)
        )
        assert settled == pytest.approx(float((before == after).all(dim=1).float().mean()))
    assert table.settled[0] < 0.5 and table.settled[50] == 1


def test_a_scale_that_is_not_the_optimum_is_found_in_a_single_channel(weights, monkeypatch):
    assert optimum_excess(weights.items(), (3, 9)) <= 1e-7

    def spoilt(weight, levels):
        scale = optimal_scale(weight, levels)
        scale[1] *= 3
        return scale

    monkeypatch.setitem(grid_study.SCALES, "optimal", spoilt)
    assert optimum_excess(weights.items(), (3, 9)) > 0.1


def test_gaussian_errors_are_the_known_ones():
    table = gaussian_errors((3, 5), torch.Generator().manual_seed(1))
    # Max 1960, uniform quantizers: 0.1902 and 0.0822
    assert table.optimal.tolist() == pytest.approx([0.190, 0.082], rel=0.02)
    assert (table.optimal <= table.alternating).all()
    assert (table.alternating < table.minmax).all()


def test_an_example_holds_the_channels_and_their_scales(weights):
    example = channel_example(weights, levels=3, channels=(0, 2))
    label = "linear\nchannel 2"
    values = example.weights.weight[example.weights.channel == label]
    np.testing.assert_allclose(values, weights["linear"][2].numpy(), rtol=1e-6)
    chosen = example.scales[example.scales.channel == label].set_index("method").scale
    channel = weights["linear"][2:3]
    errors = {
        method: float(relative_mse(channel, fake_quantize(channel, torch.tensor([[s]]), 3)))
        for method, s in chosen.items()
    }
    assert errors["optimal"] <= errors["alternating"] <= errors["minmax"]
