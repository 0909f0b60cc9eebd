"""What the ablation says: rows with their intervals, and differences of rows."""

__all__ = [
    "SCORES",
    "Finished",
    "Spread",
    "fewest",
    "difference",
    "difference_table",
    "finished",
    "row_table",
]

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import digamma, polygamma
from scipy.stats import t as student_t

from bf_lib.curriculum import is_certain
from bf_lib.taught_rows import Ablation, record_of, state_of

# score of a prompt -> 1 if more is better, -1 if less is
SCORES = {"clip": 1, "passed": 1, "mse": -1}
ABOUT = ("paper_bits", "stored_bits", "stored_mb", "coded_bits", "held_out")
MOST = 1e4  # degrees of freedom, beyond which rows are alike


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A row with all of its seeds that are done."""

    name: str
    group: str
    paper_bits: float
    stored_bits: float
    stored_mb: float
    coded_bits: float  # of the entropy-coded file, if there is one; a mean over trainings
    held_out: float  # error of the noise (Eq. 6) on held-out scenes; of those that have it
    trained: bool  # or the same for each seed
    scores: Mapping[str, np.ndarray]  # name -> (seeds, prompts)
    trainings: tuple[int, ...]  # which seeds these are
    first: str = ""  # its first stage: rows with the same go on from the same weights

    @property
    def seeds(self) -> int:
        """How many trainings there are of it."""
        return len(self.trainings)

    def goes_on_as(self, other: Self) -> bool:
        """Whether both were trained from the same weights on, for each seed."""
        shared = set(self.trainings) & set(other.trainings)
        return bool(self.first and self.first == other.first and self is not other and shared)

    def over(self, other: Self) -> Self:
        """Returns by how much its scores are above another's, training by training."""
        shared = tuple(seed for seed in self.trainings if seed in other.trainings)
        scores = {
            score: np.stack([self._of(score, seed) - other._of(score, seed) for seed in shared])
            for score in self.scores
        }
        name = f"{self.name} over {other.name}"
        return replace(self, name=name, scores=scores, trainings=shared)

    def _of(self, score: str, seed: int) -> np.ndarray:
        return self.scores[score][self.trainings.index(seed)]


def finished(ablation: Ablation) -> dict[str, Finished]:
    """Reads all rows of which at least one seed is done, by name, in the order of the ablation."""
    found = {}
    for row in ablation.rows:
        done = [seed for seed in row.seeds if state_of(ablation, row, seed) == "done"]
        records = [record_of(ablation, row, seed) for seed in done]
        if records:
            sizes = {name: records[0][name] for name in ("paper_bits", "stored_bits", "stored_mb")}
            sizes["coded_bits"] = float(np.mean([r["coded_bits"] or np.nan for r in records]))
            held_out = [r["held_out"] for r in records if "held_out" in r]  # older ones lack it
            sizes["held_out"] = float(np.mean(held_out)) if held_out else math.nan
            scores = {s: np.array([r["found"][s] for r in records], float) for s in SCORES}
            trained = not is_certain(row.form, row.stages)
            first = ablation.stage_folder(row, 0, 0).name if row.stages else ""
            about = {"trained": trained, "trainings": tuple(done), "first": first}
            found[row.name] = Finished(row.name, row.group, **sizes, **about, scores=scores)
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the mean score of a row varies from training to training.

    Three trainings tell little about that, and rows are too unlike to have one variance for all.
    So each row's own is moderated by those of the others, as Smyth (2004,
    https://doi.org/10.2202/1544-6115.1027) does it: true variances are taken to be scattered
    about `variance` as those of samples with `freedom` degrees are, both fitted to what was found.
    """

    variance: float
    freedom: float  # the more alike rows are, the larger; 0 if no row has two trainings
    alike: bool = False  # rows differ no more than by chance: all have `variance`
    single: float = 0.0  # mean variance of single prompts, beside that of means
    of_pairs: Self | None = None  # of differences of rows that go on from the same weights

    @classmethod
    def of(cls, rows: Mapping[str, Finished], score: str) -> Self:
        """Fits it to the rows that were trained more than once, and to differences of such."""
        firsts: dict[str, Finished] = {}
        pairs = [
            row.over(base)
            for row in rows.values()
            if row.first and row.goes_on_as(base := firsts.setdefault(row.first, row))
        ]
        return replace(cls._fitted(rows.values(), score), of_pairs=cls._fitted(pairs, score))

    @classmethod
    def _fitted(cls, rows: Iterable[Finished], score: str) -> Self:
        """Fits it to the rows that were trained more than once (Smyth, §6.2)."""
        several = [row for row in rows if row.seeds > 1]
        if not several:
            return cls(math.nan, 0)
        variances, degrees = np.array([_own(row, score) for row in several], float).T
        single = float(np.mean([_of_single_prompts(row, score) for row in several]))
        mean = float(np.average(variances, weights=degrees))
        pooled = cls(mean, float(degrees.sum()), True, single)
        if len(several) < 3 or not pooled.variance > 0:
            return pooled
        floor = 1e-5 * np.median(variances[variances > 0])
        logs = np.log(np.maximum(variances, floor)) - digamma(degrees / 2) + np.log(degrees / 2)
        excess = logs.var(ddof=1) - polygamma(1, degrees / 2).mean()
        if not excess > polygamma(1, MOST / 2):
            return pooled
        half = brentq(lambda x: polygamma(1, x) - excess, 1e-6, MOST / 2)
        variance = float(np.exp(logs.mean() + digamma(half) - np.log(half)))
        return cls(variance, 2 * half, False, single)

    def of_row(self, row: Finished, score: str) -> tuple[float, float]:
        """Returns the variance of a row's trainings, and its degrees of freedom."""
        if self.alike or row.seeds < 2:
            return self.variance, self.freedom
        own, degrees = _own(row, score)
        freedom = self.freedom + degrees
        return (self.freedom * self.variance + degrees * own) / freedom, freedom

    def of_single_prompts(self, row: Finished, score: str) -> float:
        """Returns the variance of a prompt's score by trainings, beside that of the row's mean."""
        return self.single if row.seeds < 2 else _of_single_prompts(row, score)


def _own(row: Finished, score: str) -> tuple[float, int]:
    return float(row.scores[score].mean(axis=1).var(ddof=1)), row.seeds - 1


def _of_single_prompts(row: Finished, score: str) -> float:
    """Returns the mean square of the interaction of trainings and prompts."""
    scores = row.scores[score]
    centred = scores - scores.mean(axis=0)
    centred = centred - centred.mean(axis=1, keepdims=True)
    return float((centred**2).sum() / ((scores.shape[0] - 1) * (scores.shape[1] - 1)))


def difference(
    first: Finished, second: Finished | None, score: str, spread: Spread
) -> dict[str, float]:
    """Returns by how much the first row's mean is above the second's: value, low, high and p.

    Low and high are the 95 % interval; p is the probability, if there were no difference, of one
    as large or larger, of either sign.

    Two things make it uncertain: which prompts were asked, of which both sides have the same, from
    the same noise, so that differences of pairs count; and by what luck each was trained. The luck
    of single prompts is part of both what means of trainings and what prompts differ by, and is
    counted once, among the former. Where both go on from the same weights, what varies is their
    difference, training by training; that others of one seed see the same examples is left out of
    account. The interval is Student's, its degrees of freedom by Welch and Satterthwaite. Where
    no row has two trainings, it is over prompts alone.

    Arguments:
        first: A row.
        second: Another; None gives the interval of the first one's mean.
        score: One of `SCORES`.
        spread: That of all rows, in this score.
    """
    pairs = spread.of_pairs
    if second is not None and first.goes_on_as(second) and pairs is not None and pairs.freedom:
        return difference(first.over(second), None, score, pairs)
    values = first.scores[score].mean(axis=0)
    if second is not None:
        values = values - second.scores[score].mean(axis=0)
    by_luck = [row for row in (first, second) if row and row.trained and spread.freedom]
    luck = sum(spread.of_single_prompts(row, score) / row.seeds for row in by_luck)
    parts = [(max(values.var(ddof=1) - luck, 0.0) / len(values), len(values) - 1)]
    if by_luck:  # one part, since what both rows' variances owe to the others is the same
        variances, freedoms = zip(*(spread.of_row(row, score) for row in by_luck), strict=True)
        means = [v / row.seeds for v, row in zip(variances, by_luck, strict=True)]
        parts.append((sum(means), min(freedoms)))
    variance = float(sum(part for part, _ in parts))
    value, half = float(values.mean()), 0.0
    p = float(value == 0)
    if math.isnan(variance):  # of scores that are no numbers
        half = p = math.nan
    elif variance > 0:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
        half = float(student_t.ppf(0.975, freedom) * variance**0.5)
        p = 2 * float(student_t.sf(abs(value) / variance**0.5, freedom))
    return {"value": value, "low": value - half, "high": value + half, "p": p}


def difference_table(
    rows: Mapping[str, Finished],
    pairs: Sequence[tuple[str, str]],
    scores: Sequence[str] = tuple(SCORES),
) -> pd.DataFrame:
    """Returns by how much rows are above others; pairs of which one is not finished are left out.

    Returns:
        Columns name, over, seeds (the fewer of both), score, value, low and high (95 %).
    """
    columns = ["name", "over", "seeds", "score", "value", "low", "high"]
    spreads = {score: Spread.of(rows, score) for score in scores}
    records = [
        {"name": a, "over": b, "seeds": fewest(rows[a], rows[b]), "score": score}
        | difference(rows[a], rows[b], score, spreads[score])
        for score in scores
        for a, b in pairs
        if a in rows and b in rows
    ]
    return pd.DataFrame(records, columns=columns)


def fewest(*rows: Finished) -> int:
    """Returns the least number of trainings of rows that are trained at all."""
    return min((row.seeds for row in rows if row.trained), default=1)


def row_table(rows: Mapping[str, Finished]) -> pd.DataFrame:
    """Returns a row for each row and score.

    Returns:
        Columns row, group, seeds, paper_bits, stored_bits, stored_mb, coded_bits, held_out, score,
        value, low and high (95 %, over trainings and prompts).
    """
    spreads = {score: Spread.of(rows, score) for score in SCORES}
    records = []
    for row in rows.values():
        about = {"row": row.name, "group": row.group, "seeds": row.seeds}
        about |= {name: getattr(row, name) for name in ABOUT}
        for score, spread in spreads.items():
            found = difference(row, None, score, spread)
            del found["p"]  # that a mean is zero is nothing to ask
            records.append(about | {"score": score} | found)
    return pd.DataFrame(records)
