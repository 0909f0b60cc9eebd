"""How much of a sweep is noise: what other prompts and seeds would have made of it.

A layer's value in one sweep is its own plus the luck of the prompts. Reliability is the share of
the variance over layers that is the layers' own: 1 where any prompts tell the same, 0 where the
values are luck. A correlation of two metrics can be no stronger than the roots of their
reliabilities let it: dividing by them estimates what it would be without the luck (Spearman's
correction for attenuation, 1904).
"""

__all__ = [
    "corrected_table",
    "disattenuated",
    "intraclass",
    "reliability_table",
    "repeated",
    "split_half",
]

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pandas as pd
from numpy import ndarray as Array
from scipy.stats import rankdata

from bf_lib.sensitivity.correlation import interval, pearson


def repeated(frames: Sequence[pd.DataFrame], metric: str, bits: int) -> Array:
    """Returns a metric of the layers that all sweeps have, with shape (sweeps, layers).

    Arguments:
        frames: Tables of sweeps with other prompts and seeds.
        metric: A column of them.
        bits: The bit-width.
    """
    columns = [f[f.bits == bits].set_index("layer")[metric] for f in frames]
    return pd.concat(columns, axis=1, join="inner").to_numpy().T


def intraclass(values: Array, axis: int = -1) -> Array:
    """Returns the intraclass correlation ICC(3,1): how reliable one sweep is.

    It is (MS_layers - MS_error) / (MS_layers + (k - 1) MS_error) of a two-way analysis of
    variance without interaction (Shrout and Fleiss, 1979). That one set of prompts is harder for
    all layers alike is not held against it, since correlations are blind to that.

    Arguments:
        values: A metric, with shape (sweeps, *, layers).
        axis: The axis of the layers, the last one.
    """
    sweeps, layers = values.shape[0], values.shape[axis]
    grand = values.mean(axis=(0, axis), keepdims=True)
    of_layer = values.mean(axis=0, keepdims=True)
    of_sweep = values.mean(axis=axis, keepdims=True)
    between = sweeps * ((of_layer - grand) ** 2).sum(axis=(0, axis)) / (layers - 1)
    error = ((values - of_layer - of_sweep + grand) ** 2).sum(axis=(0, axis))
    error = error / ((layers - 1) * (sweeps - 1))
    total = between + (sweeps - 1) * error
    return np.divide(between - error, total, out=np.zeros_like(total), where=total > 0)


def disattenuated(x: Array, y: Array, axis: int = -1) -> Array:
    """Returns the correlation of two metrics, corrected for the luck in both.

    The metrics of one sweep share its prompts, and so some of their luck. Hence all covariances
    are between a sweep and another one, of x with y as well as of x with x and y with y:
    cov(x, y') / sqrt(cov(x, x') cov(y, y')). It may exceed 1 by chance, and is NaN where a metric
    does not agree with itself: then there is nothing to correct.

    Arguments:
        x: One metric, with shape (sweeps, *, layers).
        y: The other, of the same shape.
        axis: The axis of the layers, the last one.
    """
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    across = _between_sweeps(x, y, axis)
    own = _between_sweeps(x, x, axis), _between_sweeps(y, y, axis)
    known = (own[0] > 0) & (own[1] > 0)
    return np.where(known, across / np.sqrt(np.where(known, own[0] * own[1], 1.0)), np.nan)


def _between_sweeps(a: Array, b: Array, axis: int) -> Array:
    """Returns the mean covariance of one metric in a sweep with another in another sweep."""
    pairs = permutations(range(len(a)), 2)
    return np.mean([(a[i] * b[j]).mean(axis=axis) for i, j in pairs], axis=0)


def reliability_table(frames: Sequence[pd.DataFrame], metrics: Sequence[str]) -> pd.DataFrame:
    """Returns how reliable each metric of one sweep is, at each bit-width.

    Arguments:
        frames: Tables of sweeps with other prompts and seeds.
        metrics: Columns of them.

    Returns:
        Columns metric, bits, layers, icc, low, high (its 95 % interval, over layers).
    """
    records = []
    for b in sorted(frames[0].bits.unique()):
        for metric in metrics:
            values = repeated(frames, metric, b)
            low, high = interval(intraclass, values, method="percentile")
            found = {"icc": float(intraclass(values)), "low": low, "high": high}
            records.append({"metric": metric, "bits": b, "layers": values.shape[1]} | found)
    return pd.DataFrame(records)


def corrected_table(frames: Sequence[pd.DataFrame], first: str, second: str) -> pd.DataFrame:
    """Returns the correlation of two metrics as it is and without the luck, by bit-width.

    Arguments:
        frames: Tables of sweeps with other prompts and seeds.
        first: A column of them.
        second: Another column.

    Returns:
        Columns bits, layers, observed (the mean of Pearson's over the sweeps), corrected, low and
        high (the interval of the corrected one; infinite where too many resamples have none).
    """
    records = []
    for b in sorted(frames[0].bits.unique()):
        x, y = repeated(frames, first, b), repeated(frames, second, b)
        records.append(
            {
                "bits": b,
                "layers": x.shape[1],
                "observed": float(pearson(x, y).mean()),
                "corrected": float(disattenuated(x, y)),
            }
            | dict(zip(("low", "high"), _resampled(x, y), strict=True))
        )
    return pd.DataFrame(records)


def _resampled(x: Array, y: Array, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Returns the percentile interval of the corrected correlation.

    `scipy.stats.bootstrap` gives none when a resample has no value. Such a resample may stand for
    any correlation, so it widens the interval on both sides here.
    """
    layers = x.shape[1]
    chosen = np.random.default_rng(seed).integers(layers, size=(resamples, layers))
    values = disattenuated(x[:, chosen], y[:, chosen])
    lows, highs = (np.where(np.isnan(values), end, values) for end in (-np.inf, np.inf))
    low = np.quantile(lows, 0.025, method="lower")  # interpolating infinities gives NaN
    return float(low), float(np.quantile(highs, 0.975, method="higher"))


def split_half(values: Array, ranks: bool = True, splits: int = 200, seed: int = 0) -> float:
    """Returns the reliability of a sweep over layers, from halves of its own prompts.

    The correlation of the means over one half and over the other, averaged over random splits,
    and stepped up to all prompts: 2 r / (1 + r) (Spearman and Brown, 1910). An estimate that knew
    every layer's own value could correlate with the sweep by the root of this, and no more.

    Arguments:
        values: A metric of each layer and prompt, with shape (layers, prompts).
        ranks: Whether to correlate ranks, as Spearman's does, or values.
        splits: How many random splits.
        seed: Of the splits.
    """
    if values.shape[1] < 2:
        raise ValueError("one prompt has no halves")
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        order = rng.permutation(values.shape[1])
        half = len(order) // 2
        a, b = values[:, order[:half]].mean(axis=1), values[:, order[half : 2 * half]].mean(axis=1)
        found.append(pearson(rankdata(a), rankdata(b)) if ranks else pearson(a, b))
    r = float(np.mean(found))
    return 2 * r / (1 + r)
