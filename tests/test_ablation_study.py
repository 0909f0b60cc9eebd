"""What is said of the ablation: intervals that cover, differences of pairs, verdicts."""

from dataclasses import replace

import numpy as np
import pytest
from lessons import RECIPES
from scipy.stats import ttest_1samp

from bf_lib.ablation_rows import ablation_rows
from bf_lib.ablation_study import (
    SCORES,
    Finished,
    Spread,
    difference,
    difference_table,
    row_table,
)
from bf_lib.claims import make_claim
from bf_lib.paper_claims import (
    ALONE,
    CLAIMS,
    LEFT,
    NOISE,
    NOT_REPRODUCED,
    REPRODUCED,
    PaperClaim,
    claim_table,
    claims_beside_teacher,
)
from bf_lib.recipe import Recipe
from bf_lib.times import uniform


def row(name: str, values: np.ndarray, trained: bool = True, first: str = "") -> Finished:
    scores = {"clip": values, "passed": values, "mse": -values}
    seeds = tuple(range(len(values)))
    return Finished(name, "paper", 1.9, 2.1, 3.6, 2.0, 0.001, trained, scores, seeds, first)


def drawn(
    mean: float,
    seeds: int = 3,
    prompts: int = 200,
    seed: int = 0,
    spread: float = 0.0,
    single: float = 0.1,
):
    """Scores of prompts that differ much, and of trainings that differ by `spread`.

    Single prompts differ by `single` from training to training, beside that.
    """
    rng = np.random.default_rng(seed)
    easy = np.random.default_rng(99).normal(size=prompts)  # the same prompts each time
    own = rng.normal(size=(seeds, prompts)) * single
    return mean + easy + own + spread * rng.normal(size=(seeds, 1))


def of(*rows: Finished) -> Spread:
    return Spread.of({row.name: row for row in rows}, "clip")


def test_a_row_that_is_not_trained_differs_from_itself_by_nothing():
    a = row("a", drawn(0.0, seeds=1), trained=False)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert difference(a, a, "clip", of(a)) == nothing


def test_without_training_p_is_that_of_students_test():
    a = row("a", drawn(0.1, seeds=1, prompts=30), trained=False)
    b = row("b", drawn(0.0, seeds=1, prompts=30, seed=1), trained=False)
    pairs = a.scores["clip"][0] - b.scores["clip"][0]
    found = difference(a, b, "clip", of(a, b))["p"]
    assert found == pytest.approx(ttest_1samp(pairs, 0).pvalue)


def test_pairs_tell_more_than_each_by_itself():
    a, b = row("a", drawn(0.3)), row("b", drawn(0.0, seed=1))
    found = difference(a, b, "clip", of(a, b))
    assert found["value"] == pytest.approx(0.3, abs=0.03)
    alone = difference(a, None, "clip", of(a, b))
    assert found["high"] - found["low"] < 0.5 * (alone["high"] - alone["low"])
    assert alone["low"] < alone["value"] < alone["high"]


def trainings(*means: float) -> np.ndarray:
    """A prompt's scores by trainings."""
    return np.array(means)[:, None] + np.zeros((1, 2))


def test_rows_that_are_alike_share_a_spread():
    values = [trainings(0, 2), trainings(5, 6, 7), trainings(9)]
    found = of(*(row(str(i), value) for i, value in enumerate(values)))
    assert found.alike and found.freedom == 3
    assert found.variance == pytest.approx((1 + 1 + 1 + 0 + 1) / 3)
    assert found.of_row(row("another", trainings(0, 9, 18)), "clip") == (found.variance, 3)


def test_spreads_that_differ_are_told_apart():
    """Smyth's hyperparameters are recovered from variances that are drawn by his model."""
    rng = np.random.default_rng(0)
    freedom, variance = 4.0, 0.25
    true = freedom * variance / rng.chisquare(freedom, size=20_000)
    rows = [row(str(i), trainings(*rng.normal(size=3) * v**0.5)) for i, v in enumerate(true)]
    found = of(*rows)
    assert not found.alike
    assert found.freedom == pytest.approx(freedom, rel=0.15)
    assert found.variance == pytest.approx(variance, rel=0.05)
    own = rows[0].scores["clip"].mean(axis=1).var(ddof=1)
    moderated, degrees = found.of_row(rows[0], "clip")
    assert min(own, found.variance) < moderated < max(own, found.variance)
    assert degrees == pytest.approx(found.freedom + 2)


@pytest.mark.parametrize(
    ("seeds", "spreads", "single"),
    [
        (1, (0.2, 0.2), 0.1),
        (3, (0.2, 0.2), 0.1),
        (3, (0.1, 0.3), 0.1),
        (1, (0.0, 0.0), 1.0),
        (3, (0.0, 0.0), 1.0),
    ],
)
def test_intervals_cover_what_they_are_of(seeds, spreads, single):
    """Of differences of two rows that are alike, some five of a hundred intervals miss zero.

    So it is for rows of one training, if others like them say how much trainings vary, for rows of
    three if half of them vary three times as much as the others, and where all that differs from
    training to training is the luck of single prompts.
    """
    outside = 0
    for trial in range(200):
        spread = spreads[trial % 2]
        others = [
            row(name, drawn(0.0, 3, 60, 1000 * trial + i, spreads[i % 2], single))
            for i, name in enumerate("abcdefgh")
        ]
        a, b = (
            row(name, drawn(0.0, seeds, 60, 1000 * trial + 100 + i, spread, single))
            for i, name in enumerate("xy")
        )
        found = difference(a, b, "clip", of(a, b, *others))
        outside += not found["low"] <= 0 <= found["high"]
    assert 2 <= outside <= 20


def test_rows_that_go_on_from_the_same_weights_are_compared_training_by_training():
    """The luck of the first stage is in both; that of the second alone makes intervals miss."""
    outside, widths = 0, []
    for trial in range(200):
        rows = []
        for family in range(4):
            seed = 1000 * trial + 10 * family
            start = drawn(0.0, 3, 60, seed, spread=0.5)
            more = [drawn(0.0, 3, 60, seed + i, 0.05) - drawn(0.0, 1, 60, 0, 0, 0) for i in (1, 2)]
            rows += [row(f"{family}", start, first=f"{family}")]
            rows += [
                row(f"{family}+{i}", start + m, first=f"{family}") for i, m in enumerate(more)
            ]
        spread = of(*rows)
        found = difference(rows[1], rows[0], "clip", spread)
        outside += not found["low"] <= 0 <= found["high"]
        apart = difference(replace(rows[1], first=""), rows[0], "clip", spread)
        widths.append((found["high"] - found["low"]) / (apart["high"] - apart["low"]))
    assert 2 <= outside <= 20
    assert np.median(widths) < 0.3


def test_only_trainings_of_the_same_seed_are_paired():
    a = replace(row("a", drawn(0.0, 2), first="f"), trainings=(0, 2))
    b = replace(row("b", a.scores["clip"][::-1] + 1.0, first="f"), trainings=(2, 1))
    found = b.over(a)
    assert found.trainings == (2,)
    np.testing.assert_allclose(found.scores["clip"], 1.0)
    assert not row("c", drawn(0.0), first="other").goes_on_as(a)
    assert not replace(b, trainings=(5, 6)).goes_on_as(a)


def test_trainings_that_differ_make_intervals_wider():
    widths = []
    for spread in (0.0, 1.0):
        a, b = (row(n, drawn(0.0, seed=i, spread=spread)) for i, n in enumerate("ab", 1))
        found = difference(a, b, "clip", of(a, b))
        widths.append(found["high"] - found["low"])
    assert widths[1] > 3 * widths[0]


def test_pairs_that_are_not_there_are_left_out():
    rows = {name: row(name, drawn(i, seed=i)) for i, name in enumerate("ab")}
    table = difference_table(rows, [("b", "a"), ("b", "c")], ["clip"])
    assert table[["name", "over", "seeds"]].values.tolist() == [["b", "a", 3]]
    assert table.value[0] == pytest.approx(1.0, abs=0.05)


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
    table = claim_table(rows, claims, tuple(SCORES)).pivot(
        index="claim", columns="score", values="verdict"
    )
    wanted = {"yes": REPRODUCED, "no": NOT_REPRODUCED, "perhaps": NOISE, "later": LEFT}
    for score in SCORES:  # of the errors, less is better
        assert table[score].to_dict() == wanted


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_a_twentieth_where_an_interval_ends_at_zero(seeds):
    """Of trained rows, and of pairs that go on from the same weights."""
    others = [row(n, drawn(0.0, seed=i, spread=0.1)) for i, n in enumerate("xyz", 7)]
    a = row("a", drawn(0.3, seeds=seeds, spread=0.1), first="one")
    for first in ("", "one"):
        b = row("b", drawn(0.0, seeds=seeds, seed=1, spread=0.1), first=first)
        rows = [a, b, *others]
        low = difference(a, b, "clip", of(*rows))["low"]
        moved = replace(a, scores={"clip": a.scores["clip"] - low})
        found = difference(moved, b, "clip", of(*rows))
        assert found["low"] == pytest.approx(0, abs=1e-9) and found["p"] == pytest.approx(0.05)


def test_what_is_not_a_number_is_no_verdict():
    scores = drawn(1.0, seeds=1)
    scores[0, 5] = np.nan
    rows = {
        "a": row("a", scores, trained=False),
        "b": row("b", drawn(0.0, seeds=1), trained=False),
    }
    table = claim_table(rows, [PaperClaim("broken", "a", "b", 0.1, "Table 4")], ["clip"])
    assert np.isnan(table.p[0]) and np.isnan(table.low[0]) and table.verdict[0] == NOISE


def test_rows_have_no_p():
    rows = {"a": row("a", drawn(1.0))}
    assert "p" not in row_table(rows) and {"value", "low", "high"} <= set(row_table(rows))


def test_many_claims_are_judged_together():
    """A difference that is told apart by itself is not, among many of which none is."""
    base = drawn(0.0, seeds=1)
    rows = {"base": row("base", base, trained=False)}
    for n, t in enumerate([2.4, *np.linspace(-1.5, 1, 39)]):  # of Student's test
        apart = drawn(0.0, seeds=1, seed=n + 1) - base
        apart = (apart - apart.mean()) / apart.std(ddof=1) + t / apart.size**0.5
        rows[str(n)] = row(str(n), base + apart, trained=False)
    claims = [PaperClaim(str(n), str(n), "base", 0.1, "Table 4") for n in range(40)]
    first = claim_table(rows, claims[:1], ["clip"])
    table = claim_table(rows, claims, ["clip"])
    assert first.q[0] == first.p[0] == table.p[0] < 0.05 and first.verdict[0] == REPRODUCED
    assert table.q[0] > 0.05 and table.verdict[0] == NOISE
    steps = sorted(table.p)  # Benjamini and Hochberg's, by hand
    wanted = [min(p * 40 / rank for rank, p in enumerate(steps, 1) if p >= own) for own in steps]
    assert sorted(table.q) == pytest.approx([min(1.0, q) for q in wanted])


def test_one_training_each_is_marked_and_says_nothing_by_itself():
    rows = {name: row(name, drawn(i, seeds=1, seed=i)) for i, name in enumerate("ab")}
    claim = PaperClaim("yes", "b", "a", 0.1, "Table 4")
    assert set(claim_table(rows, [claim]).verdict) == {ALONE}
    others = {n: row(n, drawn(0.0, seed=i)) for i, n in enumerate("xyz", 7)}
    assert set(claim_table(rows | others, [claim]).verdict) == {f"{REPRODUCED}, {ALONE}"}
    still = {name: replace(r, trained=False) for name, r in rows.items()}
    assert set(claim_table(still, [claim]).verdict) == {REPRODUCED}


def test_a_student_must_not_only_be_uncertain_to_count_as_good():
    def statuses(low: float, high: float) -> list[str]:
        gains = {"clip": {"value": (low + high) / 2, "low": low, "high": high}}
        about, found = {"preset": "mini", "presets": ("mini",)}, []
        for claim in claims_beside_teacher("student", gains):
            kind = "aim" if claim.pop("aim", False) else "comparison"
            found.append(make_claim(kind=kind, **about | claim).status)
        return found

    assert statuses(0.001, 0.02) == ["reproduced", "met"]
    assert statuses(-0.009, 0.02) == ["inconclusive", "met"]
    assert statuses(-0.009, -0.001) == ["differs", "met"]
    assert statuses(-0.5, 0.5) == ["inconclusive", "inconclusive"]
    assert statuses(-0.5, -0.011) == ["differs", "missed"]


def test_claims_are_about_rows_that_there_are():
    recipes = {name: Recipe({"a": 3}) for name in RECIPES}
    rows = {row.name for row in ablation_rows(recipes, uniform().tolist())}
    assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= rows
