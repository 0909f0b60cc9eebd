"""Densities of time-steps: sums, distribution functions, and draws that follow them."""

import numpy as np
import pytest
import torch

from bf_lib.times import beta, draw_times, fitted, uniform


def test_densities_are_densities():
    for density in (uniform(), beta(3.0), beta(1.5), beta(2.0, 3.0), fitted([0, 999], [1.0, 3.0])):
        assert density.shape == (1000,) and (density >= 0).all()
        assert float(density.sum()) == pytest.approx(1, abs=1e-12)


def test_beta_is_that_of_the_paper():
    density = beta(3.0)  # cumulated, x^3
    for share, wanted in ((0.9, 0.271), (0.8, 0.488), (0.5, 0.875)):
        assert float(density[int(share * 1000) :].sum()) == pytest.approx(wanted, abs=1e-9)
    torch.testing.assert_close(beta(1.0), uniform())
    assert float((beta(3.0) * torch.arange(0.5, 1000)).sum() / 1000) == pytest.approx(
        0.75, abs=1e-3
    )


def test_a_fitted_density_is_in_proportion_to_the_error():
    density = fitted([100, 300], [1.0, 5.0], steps=400)
    assert float(density[200] / density[100]) == pytest.approx(3)
    assert float(density[0] / density[100]) == 1 and float(density[399] / density[300]) == 1


@pytest.mark.parametrize("density", [uniform(), beta(3.0), fitted([0, 500, 999], [0.0, 4.0, 1.0])])
def test_draws_follow_the_density(density):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_times(density, 16, generator) for _ in range(4000)])
    assert drawn.min() >= 0 and drawn.max() <= 999
    counts = torch.bincount(drawn, minlength=1000).view(20, 50).sum(1) / len(drawn)
    np.testing.assert_allclose(counts, density.view(20, 50).sum(1), atol=0.002)


def test_a_batch_has_one_of_each_stretch():
    for seed in range(20):
        drawn = draw_times(uniform(), 10, torch.Generator().manual_seed(seed))
        assert (drawn // 100).tolist() == list(range(10))


def test_time_steps_of_no_probability_are_not_drawn():
    density = torch.zeros(1000, dtype=torch.float64)
    density[[3, 500]] = 0.5
    drawn = draw_times(density, 100, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [3] * 50 + [500] * 50


@pytest.mark.parametrize(
    ("times", "errors"), [([5, 3], [1, 1]), ([0, 1], [1, -1]), ([0, 1], [1, np.nan]), ([0], [0])]
)
def test_what_is_no_density_is_refused(times, errors):
    with pytest.raises(ValueError, match="fit"):
        fitted(times, errors)


def test_impossible_parameters_are_refused():
    with pytest.raises(ValueError, match="positive"):
        beta(0.0)
