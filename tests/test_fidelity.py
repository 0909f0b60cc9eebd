"""How estimates are held against a sweep."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from toys import TOKENS, UNET, toy_pipeline, toy_unet

from bf_lib.layers import list_layers
from bf_lib.sampling import Sampler
from bf_lib.sensitivity import Sweep
from bf_lib.sensitivity.cost import counted, estimate_flops, sweep_flops
from bf_lib.sensitivity.fidelity import ceilings, compared, estimated, fidelity_table, within

LAYERS = list_layers(toy_unet())
SAMPLER = Sampler(steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def sweep_table():
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"layer": [x.name for x in LAYERS], "bits": b}).assign(
            mse=rng.lognormal(size=256), clip_drop=rng.normal(size=256)
        )
        for b in (1, 2, 3)
    ]
    return pd.concat(parts).sort_values(["layer", "bits"], ignore_index=True)


def rows_of(table, noise, seed=0):
    """An estimate that knows the sweep's errors but for some noise."""
    rng = np.random.default_rng(seed)
    wide = table.pivot(index="layer", columns="bits", values="mse").loc[[x.name for x in LAYERS]]
    errors = wide.to_numpy() * np.exp(noise * rng.normal(size=wide.shape))
    return [
        {"start": 0, "count": 1, "errors": errors[..., None].tolist(), "seconds": 1.5},
        {"start": 1, "count": 1, "errors": errors[..., None].tolist(), "seconds": 2.0},
    ]


def test_an_estimate_meets_the_row_of_its_candidate(sweep_table):
    found = estimated(rows_of(sweep_table, 0.0), sweep_table, LAYERS, (1, 2, 3))
    assert len(found) == 768
    np.testing.assert_allclose(found.error, found.mse)


def test_an_estimate_keeps_the_order_of_its_bits(sweep_table):
    rows = rows_of(sweep_table, 0.0)
    for row in rows:
        row["errors"] = np.array(row["errors"])[:, ::-1].tolist()
    found = estimated(rows, sweep_table, LAYERS, (3, 2, 1))
    np.testing.assert_allclose(found.error, found.mse)


def test_fidelity_is_told_by_bits_and_in_all(sweep_table):
    cost = counted(UNET, toy_pipeline().vae.config, TOKENS)
    sweep = Sweep("mini", ("a", "b"), (0, 1), SAMPLER)
    estimates = {
        ("image gradient", 1, 1): rows_of(sweep_table, 1.0),
        ("image gradient", 2, 4): rows_of(sweep_table, 0.1),
    }
    table = fidelity_table(estimates, sweep_table, LAYERS, sweep, cost)
    assert len(table) == 2 * 2 * 4
    first = table[(table.prompts == 1) & (table.metric == "mse") & (table.bits == "2")].iloc[0]
    part = estimated(estimates["image gradient", 1, 1], sweep_table, LAYERS, (1, 2, 3)).query(
        "bits == 2"
    )
    assert first.spearman == pytest.approx(stats.spearmanr(part.score, part.mse).statistic)
    assert first.low < first.spearman < first.high
    assert first.seconds == 3.5
    flops = estimate_flops(cost, "image gradient", 1, SAMPLER, 3, 1)
    assert first.share == pytest.approx(flops / sweep_flops(cost, 2, SAMPLER, 3))
    dear = table[table.prompts == 2]
    limit = dear.share.max()
    alone = dear[(dear.metric == "mse") & (dear.bits != "all")]
    assert within(table, limit).spearman == alone.spearman.min()
    assert within(table, 0.99 * limit).prompts == 1
    assert within(table, 0.0) is None


def test_the_ceiling_falls_with_the_luck_of_the_prompts(sweep_table):
    rng = np.random.default_rng(1)
    own = sweep_table.mse.to_numpy()[:, None]
    values = {
        "mse": own + 0.01 * rng.normal(size=(768, 8)),
        "clip_drop": rng.normal(size=(768, 8)),
    }
    found = ceilings(sweep_table, values).set_index(["metric", "bits"]).ceiling
    assert found["mse", "1"] > 0.99 and found["mse", "all"] > 0.99
    assert found["clip_drop", "all"] < 0.5


def test_two_columns_are_compared_at_each_bit_width(sweep_table):
    table = sweep_table.assign(again=sweep_table.mse**2, other=-sweep_table.mse)
    assert compared(table, "mse", "again").spearman.tolist() == pytest.approx([1.0] * 3)
    assert compared(table, "mse", "other").spearman.tolist() == pytest.approx([-1.0] * 3)
