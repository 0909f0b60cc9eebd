"""Reliability: a published example, and simulations whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from bf_lib.sensitivity.reliability import (
    corrected_table,
    disattenuated,
    intraclass,
    reliability_table,
    repeated,
    split_half,
)

# Shrout and Fleiss (1979), Table 2: four judges rate six targets.
JUDGES = np.array(
    [
        [9, 6, 8, 7, 10, 6],
        [2, 1, 4, 1, 5, 2],
        [5, 3, 6, 2, 6, 4],
        [8, 2, 8, 6, 9, 7],
    ],
    dtype=float,
)


def sweeps(rng, layers, sweeps, reliability, true=None):
    own = rng.normal(size=layers) if true is None else true
    return own + rng.normal(scale=np.sqrt(1 / reliability - 1), size=(sweeps, layers))


def test_the_intraclass_correlation_is_that_of_shrout_and_fleiss():
    assert float(intraclass(JUDGES)) == pytest.approx(0.71, abs=0.005)
    assert float(intraclass(JUDGES + [[1], [50], [-3], [0]])) == pytest.approx(0.71, abs=0.005)


def test_it_finds_the_share_of_variance_that_is_the_layers_own():
    values = sweeps(np.random.default_rng(0), 4000, 4, reliability=0.3)
    assert float(intraclass(values)) == pytest.approx(0.3, abs=0.03)
    many = np.stack([values[:, :2000], values[:, 2000:]], axis=1)
    assert intraclass(many) == pytest.approx(0.3, abs=0.04)
    assert float(intraclass(np.ones((3, 5)))) == 0


def test_a_correlation_is_freed_of_its_noise():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(2, 5000))
    y = 0.8 * x + 0.6 * noise
    shared = rng.normal(size=(4, 5000))  # the luck of the prompts, the same for both metrics
    first, second = x + shared, y + shared + 0.5 * rng.normal(size=(4, 5000))
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]) > 0.81
    assert float(disattenuated(first, second)) == pytest.approx(0.8, abs=0.04)


def test_noise_alone_has_an_interval_without_end():
    rng = np.random.default_rng(6)
    parts = [
        pd.DataFrame({"layer": range(12), "bits": 1}).assign(
            mse=np.arange(12.0) + rng.normal(size=12), clip_drop=rng.normal(size=12)
        )
        for _ in range(3)
    ]
    (row,) = corrected_table(parts, "mse", "clip_drop").itertuples()
    assert (row.low, row.high) == (-np.inf, np.inf)


def test_noise_alone_has_no_corrected_correlation():
    alternating = np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]])
    assert np.isnan(disattenuated(alternating, alternating))


def test_halves_of_the_prompts_tell_the_reliability_of_all():
    rng, prompts = np.random.default_rng(2), 16
    own = rng.normal(size=3000)
    values = own[:, None] + rng.normal(scale=4.0, size=(3000, prompts))
    wanted = 1 / (1 + 16 / prompts)
    assert split_half(values, ranks=False, splits=20) == pytest.approx(wanted, abs=0.03)
    assert split_half(values, ranks=True, splits=20) == pytest.approx(wanted, abs=0.04)
    with pytest.raises(ValueError, match="no halves"):
        split_half(values[:, :1])


def frames(rng, count=3):
    base = pd.DataFrame({"layer": [f"l{n}" for n in range(40)], "mse": rng.normal(size=40)})
    parts = []
    for _ in range(count):
        mse = base.mse + 0.1 * rng.normal(size=40)
        drop = base.mse + 2.0 * rng.normal(size=40)
        parts.append(base.assign(bits=1, mse=mse, clip_drop=drop).sample(frac=1, random_state=0))
    return parts


def test_layers_are_matched_by_name():
    first, *others = frames(np.random.default_rng(3))
    first = pd.concat([first, first.iloc[:1].assign(layer="only here")])
    values = repeated([first, *others], "mse", 1)
    assert values.shape == (3, 40)
    assert np.corrcoef(values)[0, 1] > 0.95


def test_tables_tell_the_reliable_metric_from_the_noisy():
    parts = frames(np.random.default_rng(4))
    table = reliability_table(parts, ["mse", "clip_drop"]).set_index("metric")
    assert table.icc["mse"] > 0.97 and table.icc["clip_drop"] < 0.5
    assert (table.low <= table.icc).all() and (table.icc <= table.high).all()
    (row,) = corrected_table(parts, "mse", "clip_drop").itertuples()
    assert row.observed < 0.7 < row.corrected
    assert row.low < row.corrected < row.high
