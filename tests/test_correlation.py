"""Correlations over layers: values of scipy, intervals that cover, the paper's tables."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bf_lib.sensitivity.correlation import (
    METRICS,
    PAPER,
    beside_paper,
    between_bits,
    between_metrics,
    extreme,
    influence,
    interval,
    pearson,
    rank_agreement,
)


def correlated(rng, n, r, rows=()):
    x, noise = rng.normal(size=(2, *rows, n))
    return x, r * x + np.sqrt(1 - r * r) * noise


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    parts = []
    for b in (1, 2, 3):
        mse = rng.lognormal(size=60)
        part = pd.DataFrame({"layer": [f"l{n}" for n in range(60)], "depth": range(60)})
        part = part.assign(role="proj_in", bits=b, mse=mse, psnr=-10 * np.log10(mse))
        parts.append(part.assign(perceptual=mse**0.9, clip_drop=rng.normal(size=60)))
    return pd.concat(parts, ignore_index=True)


def test_pearson_is_that_of_scipy():
    x, y = correlated(np.random.default_rng(0), 30, 0.6, rows=(4,))
    for a, b, found in zip(x, y, pearson(x, y), strict=True):
        assert found == pytest.approx(stats.pearsonr(a, b).statistic)
    assert pearson(np.ones(5), np.arange(5.0)) == 0


def test_ranks_are_those_of_scipy_ties_and_all():
    x, y = correlated(np.random.default_rng(1), 80, 0.7)
    x, y = x.round(), y.round()
    found = rank_agreement(x, y)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["low"] < found["spearman"] < found["high"]


def test_bit_widths_of_a_layer_are_resampled_as_one():
    """Three copies of the same layers are no more layers."""
    x, y = correlated(np.random.default_rng(5), 60, 0.6)
    one = rank_agreement(x, y)
    three = rank_agreement(np.stack([x] * 3), np.stack([y] * 3))
    assert three["spearman"] == pytest.approx(one["spearman"])
    assert three["high"] - three["low"] == pytest.approx(one["high"] - one["low"], rel=0.05)


def test_intervals_are_about_those_of_fisher():
    x, y = correlated(np.random.default_rng(2), 200, 0.6)
    low, high = interval(pearson, x, y)
    wanted = stats.pearsonr(x, y).confidence_interval()
    assert (low, high) == pytest.approx(tuple(wanted), abs=0.03)


def test_the_true_correlation_is_covered_about_as_often_as_promised():
    rng, true = np.random.default_rng(3), 0.5
    inside = 0
    for seed in range(60):
        x, y = correlated(rng, 50, true)
        low, high = interval(pearson, x, y, method="percentile", seed=seed)
        inside += low <= true <= high
    assert 50 <= inside


def test_fewer_than_three_layers_have_no_interval():
    assert np.isnan(interval(pearson, np.ones(2), np.ones(2))).all()


def test_every_pair_has_a_row(rows):
    metrics, bits = between_metrics(rows), between_bits(rows)
    assert len(metrics) == 3 * 6 and len(bits) == 4 * 3
    part = rows[rows.bits == 2]
    row = metrics.set_index(["first", "second", "bits"]).loc["mse", "clip_drop", 2]
    assert row.pearson == pytest.approx(np.corrcoef(part.mse, part.clip_drop)[0, 1])
    wide = rows.pivot(index="depth", columns="bits", values="psnr")
    row = bits.set_index(["metric", "bits", "other_bits"]).loc["psnr", 1, 3]
    assert row.pearson == pytest.approx(np.corrcoef(wide[1], wide[3])[0, 1])
    assert row.spearman == pytest.approx(stats.spearmanr(wide[1], wide[3]).statistic)
    assert row.low < row.pearson < row.high


def test_the_farthest_layers_are_left_out():
    x, y = np.zeros(40), np.arange(40.0) % 2
    x[[3, 7]], y[9] = (50.0, -60.0), 30.0
    assert set(extreme(x, y, 3)) == {3, 7, 9}
    assert len(extreme(x[:6], y[:6])) == 2  # no more than a third


def test_one_layer_that_makes_a_correlation_pulls_it(rows):
    part = rows[rows.bits == 1].reset_index(drop=True).copy()
    part.loc[11, ["mse", "clip_drop"]] = 1e3
    pulls = influence(part, "mse", "clip_drop", 1)
    assert pulls.layer[0] == "l11"
    without = part.drop(11)
    gain = np.corrcoef(part.mse, part.clip_drop) - np.corrcoef(without.mse, without.clip_drop)
    assert pulls.pull[0] == pytest.approx(gain[0, 1])
    assert between_metrics(part).pearson_without.abs().max() <= 1


def test_the_paper_is_held_against_our_intervals(rows):
    metrics, bits = between_metrics(rows), between_bits(rows)
    beside = pd.concat([beside_paper(metrics), beside_paper(bits)])
    assert len(beside) == len(PAPER) == 21
    assert beside.ours.between(0, 1).all()
    inside = beside.paper.between(beside.low, beside.high)
    assert (inside == (beside.paper_is == "inside")).all()
    assert set(METRICS) == {"mse", "psnr", "perceptual", "clip_drop"}


def test_an_interval_about_zero_begins_at_zero():
    row = {"first": "mse", "second": "psnr", "bits": 1, "pearson": -0.1}
    ends = {"low": -0.3, "high": 0.2, "spearman": 0.0, "pearson_without": 0.0}
    found = beside_paper(pd.DataFrame([row | ends])).iloc[0]
    assert (found.ours, found.low, found.high, found.paper_is) == (0.1, 0.0, 0.3, "outside")
    nothing = beside_paper(pd.DataFrame([row | dict.fromkeys(ends, np.nan)])).iloc[0]
    assert nothing.paper_is == "unknown"
