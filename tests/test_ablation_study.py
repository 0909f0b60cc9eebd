"""What is said of the ablation: intervals that cover, differences of pairs, verdicts."""

import numpy as np
import pytest

from bf_lib.ablation_study import (
    CLAIMS,
    LEFT,
    NOISE,
    NOT_REPRODUCED,
    REPRODUCED,
    SCORES,
    Finished,
    PaperClaim,
    bootstrap,
    claim_table,
    difference,
    row_table,
)
from bf_lib.curriculum import FRONTIER, ablation_rows, frontier_name
from bf_lib.recipe import Recipe
from bf_lib.times import uniform


def row(name: str, values: np.ndarray) -> Finished:
    scores = {"clip": values, "passed": values, "mse": -values}
    return Finished(name, "paper", 1.9, 2.1, 3.6, 2.0, scores)


def drawn(mean: float, seeds: int = 3, prompts: int = 200, seed: int = 0, spread: float = 0.0):
    """Scores of prompts that differ much, and of trainings that differ by `spread`."""
    rng = np.random.default_rng(seed)
    easy = np.random.default_rng(99).normal(size=prompts)  # the same prompts each time
    own = rng.normal(size=(seeds, prompts)) * 0.1
    return mean + easy + own + spread * rng.normal(size=(seeds, 1))


def test_a_row_differs_from_itself_by_nothing():
    a = row("a", drawn(0.0, seeds=1))
    assert difference(a, a, "clip") == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_pairs_tell_more_than_each_by_itself():
    a, b = row("a", drawn(0.3)), row("b", drawn(0.0, seed=1))
    found = difference(a, b, "clip")
    assert found["value"] == pytest.approx(0.3, abs=0.03)
    alone = row_table({"a": a}).set_index("score").loc["clip"]
    assert found["high"] - found["low"] < 0.3 * (alone.high - alone.low)
    assert alone.low < alone.value < alone.high


def test_intervals_cover_what_they_are_of():
    """Of a hundred differences of two rows that are alike, some five intervals are beside zero."""
    outside = dict.fromkeys((3, 12), 0)
    for seeds in outside:
        for seed in range(100):
            a, b = (drawn(0.0, seeds=seeds, seed=2 * seed + i, spread=0.2) for i in range(2))
            low, high = np.quantile(bootstrap(a, b, seed), [0.025, 0.975])
            outside[seeds] += not low <= 0 <= high
    assert 1 <= outside[12] <= 14
    assert 1 <= outside[3] <= 18


def test_trainings_that_differ_make_intervals_wider():
    pairs = [(drawn(0.0, seed=1, spread=s), drawn(0.0, seed=2, spread=s)) for s in (0.0, 1.0)]
    widths = [np.ptp(np.quantile(bootstrap(a, b), [0.025, 0.975])) for a, b in pairs]
    assert widths[1] > 3 * widths[0]


def test_verdicts_follow_the_intervals():
    rows = {"good": row("good", drawn(1.0)), "bad": row("bad", drawn(0.0, seed=1))}
    rows["same"] = row(
        "same", rows["bad"].scores["clip"] + 1e-3 * drawn(0.0, seed=5) * [[1], [-1], [1]]
    )
    claims = [
        PaperClaim("yes", "good", "bad", 0.1, "Table 4"),
        PaperClaim("no", "bad", "good", 0.1, "Table 4"),
        PaperClaim("perhaps", "same", "bad", 0.1, "Table 4"),
        PaperClaim("later", "good", "none", 0.1, "Table 4"),
    ]
    table = claim_table(rows, claims).pivot(index="claim", columns="score", values="verdict")
    for score in SCORES:  # of the errors, less is better
        wanted = {"yes": REPRODUCED, "no": NOT_REPRODUCED, "perhaps": NOISE, "later": LEFT}
        assert table[score].to_dict() == wanted


def test_claims_are_about_rows_that_there_are():
    names = ["3", "5", "optimum", "optimum as large as 5", "eta 0", "eta 0.3", "eta 0.5"]
    names += [frontier_name(bits) for bits in FRONTIER]
    recipes = {name: Recipe({"a": 3}) for name in names}
    rows = {row.name for row in ablation_rows(recipes, uniform().tolist())}
    assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= rows
