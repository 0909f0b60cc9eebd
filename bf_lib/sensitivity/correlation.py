"""How the metrics of a sweep go together, with intervals (BitsFusion, §3.2, Tables 1 and 2).

Correlations are over layers, and their intervals too: what another choice of layers, from layers
such as these, might have given. They do not hold what other prompts would have changed; that is
`bf_lib.sensitivity.reliability`.
"""

__all__ = [
    "METRICS",
    "PAPER",
    "beside_paper",
    "between_bits",
    "between_metrics",
    "influence",
    "of_magnitude",
    "pearson",
    "rank_agreement",
]

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy import ndarray as Array
from scipy.stats import bootstrap, rankdata

RESAMPLES = 10_000
FEWEST = 3  # layers; fewer always correlate perfectly
METRICS = ("mse", "psnr", "perceptual", "clip_drop")

# |Pearson| as the paper prints it for SD-v1.5: (first, second, bits) and (metric, bits, bits)
PAPER = {
    ("mse", "psnr", 1): 0.870,
    ("mse", "perceptual", 1): 0.984,
    ("mse", "clip_drop", 1): 0.733,
    ("mse", "psnr", 2): 0.882,
    ("mse", "perceptual", 2): 0.989,
    ("mse", "clip_drop", 2): 0.473,
    ("mse", "psnr", 3): 0.869,
    ("mse", "perceptual", 3): 0.991,
    ("mse", "clip_drop", 3): 0.535,
    ("mse", 1, 2): 0.929,
    ("mse", 1, 3): 0.766,
    ("mse", 2, 3): 0.887,
    ("psnr", 1, 2): 0.954,
    ("psnr", 1, 3): 0.843,
    ("psnr", 2, 3): 0.923,
    ("perceptual", 1, 2): 0.943,
    ("perceptual", 1, 3): 0.802,
    ("perceptual", 2, 3): 0.895,
    ("clip_drop", 1, 2): 0.504,
    ("clip_drop", 1, 3): 0.344,
    ("clip_drop", 2, 3): 0.428,
}


def pearson(a: Array, b: Array, axis: int = -1) -> Array:
    """Returns Pearson's correlation along an axis; 0 where one of the two is constant."""
    a = a - a.mean(axis=axis, keepdims=True)
    b = b - b.mean(axis=axis, keepdims=True)
    size = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
    return np.divide((a * b).sum(axis=axis), size, out=np.zeros_like(size), where=size > 0)


def _spearman(a: Array, b: Array, axis: int = -1) -> Array:
    """Returns Spearman's correlation along an axis; ties have their mean rank."""
    return pearson(rankdata(a, axis=axis), rankdata(b, axis=axis), axis)


def interval(
    statistic: Callable[..., Array], *samples: Array, method: str = "BCa", seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of a statistic of paired samples (`scipy.stats`).

    Both ends are NaN for fewer layers than three.

    Arguments:
        statistic: A function of the samples and of `axis`.
        samples: Values of the same layers, each with shape (*, layers).
        method: "BCa" or "percentile".
        seed: Of the resamples.
    """
    layers = samples[0].shape[-1]
    if layers < FEWEST:
        return np.nan, np.nan

    # Places are resampled, not values, so that samples may have dimensions before the layers.
    def of_places(places: Array, axis: int = -1) -> Array:
        return statistic(*(sample[..., places] for sample in samples), axis=axis)

    low, high = bootstrap(
        (np.arange(layers),),
        of_places,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,  # resamples at once: bounds the memory
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def rank_agreement(a: Array, b: Array) -> dict[str, float]:
    """Returns Spearman's correlation with the ends of its interval over layers.

    Arguments:
        a: Values with shape (layers,), or (bits, layers) to rank all of them together; then the
            bit-widths of a layer are resampled as one.
        b: Others, of the same shape.

    Returns:
        The values spearman, low and high.
    """
    a, b = np.atleast_2d(np.asarray(a, float)), np.atleast_2d(np.asarray(b, float))
    low, high = interval(_spearman_of_all, a, b, method="percentile")
    return {"spearman": float(_spearman_of_all(a, b)), "low": low, "high": high}


def _spearman_of_all(a: Array, b: Array, axis: int = -1) -> Array:
    """Returns Spearman's correlation of values with shape (bits, *, layers), ranked together."""
    flat = (np.moveaxis(v, 0, -2).reshape(*v.shape[1:-1], -1) for v in (a, b))
    return _spearman(*flat, axis=axis)


def between_metrics(rows: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Correlates the metrics at the same bit-width, over layers (Table 1, and what it leaves out).

    Arguments:
        rows: The table of the sweep.
        metrics: Columns of it.

    Returns:
        Columns first, second, bits, pearson, low, high (its 95 % interval), spearman, and
        pearson_without (that of all but the `extreme` layers).
    """
    records = []
    for b, part in rows.groupby("bits"):
        for first, second in combinations(metrics, 2):
            x, y = part[first].to_numpy(), part[second].to_numpy()
            records.append({"first": first, "second": second, "bits": b} | _correlations(x, y))
    return pd.DataFrame(records)


def between_bits(rows: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Correlates the bit-widths in the same metric, over layers (Table 2).

    Arguments:
        rows: The table of the sweep.
        metrics: Columns of it.

    Returns:
        Columns metric, bits, other_bits, and those of `between_metrics`.
    """
    records = []
    for metric in metrics:
        wide = rows.pivot(index="depth", columns="bits", values=metric)
        for b, other in combinations(wide.columns, 2):
            found = _correlations(wide[b].to_numpy(), wide[other].to_numpy())
            records.append({"metric": metric, "bits": b, "other_bits": other} | found)
    return pd.DataFrame(records)


def _correlations(x: Array, y: Array) -> dict[str, float]:
    if len(x) < FEWEST:
        return dict.fromkeys(("pearson", "low", "high", "spearman", "pearson_without"), np.nan)
    low, high = interval(pearson, x, y)
    rest = np.setdiff1d(np.arange(len(x)), extreme(x, y))
    return {
        "pearson": float(pearson(x, y)),
        "low": low,
        "high": high,
        "spearman": float(_spearman(x, y)),
        "pearson_without": float(pearson(x[rest], y[rest])),
    }


def extreme(x: Array, y: Array, count: int = 5) -> Array:
    """Returns the places of the values farthest from the mean, in standard deviations of both.

    No more than a third of them all.
    """
    distance = sum(((v - v.mean()) / (v.std() or 1.0)) ** 2 for v in (x, y))
    return np.argsort(-distance, kind="stable")[: min(count, len(x) // FEWEST)]


def influence(rows: pd.DataFrame, first: str, second: str, bits: int) -> pd.DataFrame:
    """Tells how much each layer pulls the correlation of two metrics.

    Returns:
        One row a layer, the strongest pull first, with columns layer, role, both metrics, and
        pull: the correlation less what it is without the layer.
    """
    part = rows[rows.bits == bits]
    x, y = part[first].to_numpy(), part[second].to_numpy()
    others = ~np.eye(len(x), dtype=bool)
    without = np.array([pearson(x[mask], y[mask]) for mask in others])
    found = part[["layer", "role", first, second]].assign(pull=pearson(x, y) - without)
    return found.sort_values("pull", key=np.abs, ascending=False, ignore_index=True)


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the pairs that the paper has, as it prints them, |Pearson|, next to its values.

    Arguments:
        table: What `between_metrics` or `between_bits` returns.

    Returns:
        The columns that name the pair, ours, low, high (of |Pearson|), paper, and paper_is:
        "inside" or "outside" of our interval, or "unknown" where there is none.
    """
    names = [n for n in ("first", "second", "metric", "bits", "other_bits") if n in table]
    records = []
    for row in table.to_dict("records"):
        paper = PAPER.get(tuple(row[name] for name in names))
        if paper is None:
            continue
        low, high = of_magnitude(row["low"], row["high"])
        records.append(
            {name: row[name] for name in names}
            | {"ours": abs(row["pearson"]), "low": low, "high": high, "paper": paper}
            | {"paper_is": _place(paper, low, high)}
        )
    return pd.DataFrame(records)


def of_magnitude(low: float, high: float) -> tuple[float, float]:
    """Returns the interval of |r|, given that of r."""
    least = 0.0 if low < 0 < high else min(abs(low), abs(high))
    return least, max(abs(low), abs(high))


def _place(value: float, low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return "unknown"
    return "inside" if low <= value <= high else "outside"
