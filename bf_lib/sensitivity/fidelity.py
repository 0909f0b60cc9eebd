"""How well estimates, or trained candidates, rank the layers as the sweep does."""

__all__ = ["ceilings", "compared", "estimated", "fidelity_table", "within"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy import ndarray as Array

from bf_lib.layers import Layer
from bf_lib.sensitivity.correlation import rank_agreement
from bf_lib.sensitivity.cost import Cost, estimate_flops, sweep_flops
from bf_lib.sensitivity.estimates import combined
from bf_lib.sensitivity.reliability import split_half
from bf_lib.sensitivity.sweep import Sweep

ALL = "all"  # bit-widths together


def compared(rows: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Correlates the ranks of two columns, at each bit-width.

    Arguments:
        rows: One row a candidate, with a column bits.
        first: A column.
        second: Another one.

    Returns:
        Columns bits, spearman, low and high (its 95 % interval over layers).
    """
    found = [
        {"bits": b} | rank_agreement(part[first], part[second]) for b, part in rows.groupby("bits")
    ]
    return pd.DataFrame(found, columns=["bits", "spearman", "low", "high"])


def estimated(
    rows: Sequence[Mapping], sweep: pd.DataFrame, layers: Sequence[Layer], bits: Sequence[int]
) -> pd.DataFrame:
    """Returns the estimate of each candidate with what the sweep measured.

    Arguments:
        rows: The rows of an `Estimate` of the layers and bit-widths of the sweep.
        sweep: The table of the sweep.
        layers: The layers of the sweep.
        bits: Its bit-widths, in its order.

    Returns:
        The table of `estimates.estimate`, with columns mse and clip_drop.
    """
    table = combined(rows, layers, bits)
    return table.merge(sweep[["layer", "bits", "mse", "clip_drop"]], on=["layer", "bits"])


def fidelity_table(
    estimates: Mapping[tuple[str, int, int], Sequence[Mapping]],
    table: pd.DataFrame,
    layers: Sequence[Layer],
    sweep: Sweep,
    cost: Cost,
) -> pd.DataFrame:
    """Returns how estimates rank the layers beside the sweep, and what they cost.

    Arguments:
        estimates: The rows of each estimate, by its method, prompts and projections.
        table: The table of the sweep.
        layers: The layers of the sweep.
        sweep: The sweep.
        cost: Of its model.

    Returns:
        One row for each estimate, metric of the sweep ("mse" or "clip_drop") and bit-width ("1",
        "2", ... or "all" together): method, prompts, projections, share (of the sweep's FLOPs),
        evaluations (FLOPs in units of one UNet evaluation), seconds (of one process), metric,
        bits, spearman (of the score), low, high (its 95 % interval over layers), and
        spearman_of_mean (of the error instead of the score).
    """
    cost = replace(cost, layers=len(layers))
    bits = len(sweep.bits)
    whole = sweep_flops(cost, len(sweep.prompts), sweep.sampler, bits)
    records = []
    for (method, prompts, projections), rows in estimates.items():
        flops = estimate_flops(cost, method, prompts, sweep.sampler, bits, projections)
        shared = {
            "method": method,
            "prompts": prompts,
            "projections": projections,
            "share": flops / whole,
            "evaluations": flops / cost.forward,
            "seconds": sum(row["seconds"] for row in rows),
        }
        for b, part in _by_bits(estimated(rows, table, layers, sweep.bits)):
            for metric in ("mse", "clip_drop"):
                columns = (_by_layer(part, name) for name in ("score", metric))
                found = rank_agreement(*columns) | {
                    "spearman_of_mean": part.error.corr(part[metric], method="spearman")
                }
                records.append(shared | {"metric": metric, "bits": b} | found)
    return pd.DataFrame(records)


def ceilings(table: pd.DataFrame, values: Mapping[str, Array]) -> pd.DataFrame:
    """Returns what the sweep's own reliability allows an estimate to reach, in ranks.

    It is the root of the reliability that halves of the prompts show (`split_half`): with what the
    sweep got by the luck of its prompts, an estimate by other prompts does not go together.

    Arguments:
        table: The table of the sweep.
        values: Metrics of each of its rows and prompts, with shape (rows, prompts).

    Returns:
        Columns metric, bits ("1", "2", ... or "all") and ceiling.
    """
    table = table.reset_index(drop=True)
    records = [
        {
            "metric": metric,
            "bits": b,
            "ceiling": float(np.sqrt(max(0.0, split_half(each[part.index.to_numpy()])))),
        }
        for metric, each in values.items()
        for b, part in _by_bits(table)
    ]
    return pd.DataFrame(records)


def _by_bits(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for b, part in rows.groupby("bits"):
        yield str(b), part
    yield ALL, rows


def _by_layer(rows: pd.DataFrame, column: str) -> Array:
    """Returns a column with shape (bits, layers)."""
    return rows.pivot(index="bits", columns="layer", values=column).to_numpy()


def within(fidelity: pd.DataFrame, limit: float, metric: str = "mse") -> pd.Series | None:
    """Returns the row of the dearest image gradient that costs no more than a limit.

    That of the bit-width where its rank correlation is lowest; None where all cost more.

    Arguments:
        fidelity: What `fidelity_table` returns.
        limit: The share of the sweep's cost.
        metric: The metric of the sweep.
    """
    rows = fidelity[(fidelity.method == "image gradient") & (fidelity.metric == metric)]
    rows = rows[(rows.share <= limit) & (rows.bits != ALL)]
    dearest = rows[rows.share == rows.share.max()]
    return None if rows.empty else dearest.loc[dearest.spearman.idxmin()]
