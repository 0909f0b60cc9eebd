"""What the ablation says: rows with intervals, differences, and the paper's claims about them."""

__all__ = [
    "CLAIMS",
    "SCORES",
    "Finished",
    "PaperClaim",
    "Spread",
    "claim_table",
    "difference",
    "difference_table",
    "finished",
    "row_table",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from bf_lib.curriculum import is_certain
from bf_lib.taught_rows import Ablation, record_of, state_of

# score of a prompt -> 1 if more is better, -1 if less is
SCORES = {"clip": 1, "passed": 1, "mse": -1}
SIZES = ("paper_bits", "stored_bits", "stored_mb", "coded_bits")
REPRODUCED, NOT_REPRODUCED = "reproduced on mini", "not reproduced"
NOISE, LEFT = "not distinguishable from noise", "not finished"
ALONE = "one training each"


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A row with all of its seeds that are done."""

    name: str
    group: str
    paper_bits: float
    stored_bits: float
    stored_mb: float
    coded_bits: float  # of the entropy-coded file, if there is one; a mean over trainings
    trained: bool  # or the same for each seed
    scores: Mapping[str, np.ndarray]  # name -> (seeds, prompts)

    @property
    def seeds(self) -> int:
        """How many trainings there are of it."""
        return len(next(iter(self.scores.values())))


def finished(ablation: Ablation) -> dict[str, Finished]:
    """Reads all rows of which at least one seed is done, by name, in the order of the ablation."""
    found = {}
    for row in ablation.rows:
        done = [seed for seed in row.seeds if state_of(ablation, row, seed) == "done"]
        records = [record_of(ablation, row, seed) for seed in done]
        if records:
            sizes = {name: records[0][name] for name in ("paper_bits", "stored_bits", "stored_mb")}
            sizes["coded_bits"] = float(np.mean([r["coded_bits"] or np.nan for r in records]))
            scores = {s: np.array([r["found"][s] for r in records], float) for s in SCORES}
            trained = not is_certain(row.form, row.stages)
            found[row.name] = Finished(
                row.name, row.group, **sizes, trained=trained, scores=scores
            )
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """How much the mean score of a row varies from training to training, by all rows together."""

    variance: float
    freedom: int  # degrees of it; 0 if no row has two trainings

    @classmethod
    def of(cls, rows: Mapping[str, Finished], score: str) -> Self:
        """Pools the variance of the trainings of all rows, as an analysis of variance does."""
        means = [row.scores[score].mean(axis=1) for row in rows.values() if row.seeds > 1]
        freedom = sum(len(values) - 1 for values in means)
        squares = sum(float(((values - values.mean()) ** 2).sum()) for values in means)
        return cls(squares / freedom if freedom else math.nan, freedom)


def difference(
    first: Finished, second: Finished | None, score: str, spread: Spread
) -> dict[str, float]:
    """Returns by how much the first row's mean is above the second's, with its 95 % interval.

    Two things make it uncertain: which prompts were asked, of which both sides have the same, from
    the same noise, so that differences of pairs count; and by what luck each was trained, whose
    variance is that of all rows. The interval is Student's, with the degrees of freedom of the
    latter. Where no row has two trainings, it is over prompts alone.

    Arguments:
        first: A row.
        second: Another; None gives the interval of the first one's mean.
        score: One of `SCORES`.
        spread: That of all rows, in this score.
    """
    values = first.scores[score].mean(axis=0)
    if second is not None:
        values = values - second.scores[score].mean(axis=0)
    rows = [first] if second is None else [first, second]
    variance = values.var(ddof=1) / len(values)
    quantile = norm.ppf(0.975)
    if spread.freedom and any(row.trained for row in rows):
        variance += sum(spread.variance / row.seeds for row in rows if row.trained)
        quantile = student_t.ppf(0.975, spread.freedom)
    half = float(quantile * variance**0.5)
    value = float(values.mean())
    return {"value": value, "low": value - half, "high": value + half}


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
        {"name": a, "over": b, "seeds": _fewest(rows[a], rows[b]), "score": score}
        | difference(rows[a], rows[b], score, spreads[score])
        for score in scores
        for a, b in pairs
        if a in rows and b in rows
    ]
    return pd.DataFrame(records, columns=columns)


def _fewest(*rows: Finished) -> int:
    """Returns the least number of trainings of rows that are trained at all."""
    return min((row.seeds for row in rows if row.trained), default=1)


def row_table(rows: Mapping[str, Finished]) -> pd.DataFrame:
    """Returns a row for each row and score.

    Returns:
        Columns row, group, seeds, paper_bits, stored_bits, stored_mb, coded_bits, score, value,
        low and high (95 %, over trainings and prompts).
    """
    spreads = {score: Spread.of(rows, score) for score in SCORES}
    records = []
    for row in rows.values():
        about = {"row": row.name, "group": row.group, "seeds": row.seeds}
        about |= {name: getattr(row, name) for name in SIZES}
        for score, spread in spreads.items():
            records.append(about | {"score": score} | difference(row, None, score, spread))
    return pd.DataFrame(records)


# ---- the paper's claims


@dataclass(frozen=True, slots=True)
class PaperClaim:
    """One row of the ablation is better than another, the paper says."""

    claim: str
    better: str
    worse: str
    paper: float | None  # by how much of the CLIP score
    source: str


# The gains of Table 4 are those of its means over four guidance scales; that of its last row is
# .3193, and not .3183 as printed.
CLAIMS = (
    PaperClaim("balanced grids", "+ balance", "QAT-Base", 0.0257, "Table 4"),
    PaperClaim("alternating scales", "+ alternating scales", "+ balance", 0.0046, "Table 4"),
    PaperClaim(
        "mixed precision and caching, at fewer bits",
        "+ mixed precision and caching",
        "+ alternating scales",
        0.0018,
        "Table 4",
    ),
    PaperClaim(
        "feature distillation",
        "+ feature distillation",
        "+ mixed precision and caching",
        0.0024,
        "Table 4",
    ),
    PaperClaim(
        "time-step sampling",
        "+ time-step sampling",
        "+ feature distillation",
        0.0014,
        "Table 4",
    ),
    PaperClaim("Stage II", "+ Stage II", "+ time-step sampling", 0.0037, "Table 4"),
    PaperClaim("better than full precision", "+ Stage II", "full precision", 0.0037, "Table 4"),
    PaperClaim("lambda of .01 over .1", "3 levels", "3 levels, lambda 0.1", 0.0022, "Table 6"),
    PaperClaim("lambda of .01 over 1", "3 levels", "3 levels, lambda 1", 0.0017, "Table 6"),
    PaperClaim("alpha of 3 over 1.5", "3 levels", "3 levels, alpha 1.5", 0.0012, "Table 7"),
    PaperClaim("alpha of 3 over 2", "3 levels", "3 levels, alpha 2", 0.0008, "Table 7"),
    PaperClaim("eta of .3 over 0", "+ time-step sampling", "eta 0", 0.0026, "Table 5"),
    PaperClaim("eta of .3 over .5", "+ time-step sampling", "eta 0.5", 0.0013, "Table 5"),
    PaperClaim("over LSQ of 2 bits", "+ Stage II", "QAT-Base", 0.0363, "Table 3"),
    PaperClaim("over EfficientDM of 2 bits", "+ Stage II", "LoRA, 2 bits", 0.0294, "Table 3"),
    PaperClaim("over palettes of 2 bits", "+ Stage II", "palettes, 2 bits", 0.0189, "Table 3"),
    PaperClaim(
        "better than full precision with its data and steps",
        "+ Stage II",
        "full precision, Stage II",
        None,
        "no such row",
    ),
    PaperClaim(
        "distillation over noise prediction",
        "3 levels, no features",
        "3 levels, noise predicted in Stage I",
        None,
        "§4.2",
    ),
    PaperClaim(
        "captions dropped in distillation",
        "3 levels",
        "3 levels, captions never dropped",
        None,
        "§4.2",
    ),
    PaperClaim(
        "feature distillation, 3 levels", "3 levels", "3 levels, no features", 0.0024, "Table 4"
    ),
    PaperClaim(
        "time-step sampling, 3 levels", "3 levels", "3 levels, uniform times", 0.0014, "Table 4"
    ),
    PaperClaim("Stage II, 3 levels", "3 levels, Stage II", "3 levels", 0.0037, "Table 4"),
)


def claim_table(
    rows: Mapping[str, Finished],
    claims: Sequence[PaperClaim] = CLAIMS,
    scores: Sequence[str] = tuple(SCORES),
) -> pd.DataFrame:
    """Says for each claim of the paper what the ablation found.

    Returns:
        Columns claim, source, paper (of the CLIP score), score, value, low, high, seeds (the
        fewer of both rows) and verdict: "reproduced on mini" if all of the interval is on the
        claim's side of zero, "not reproduced" if it is on the other, else "not distinguishable
        from noise"; "not finished" where a row is missing, and "one training each" as long as
        no row has two. Of twenty claims one interval is beside zero by chance.
    """
    spreads = {score: Spread.of(rows, score) for score in scores}
    records = []
    for claim in claims:
        pair = rows.get(claim.better), rows.get(claim.worse)
        about = {"claim": claim.claim, "source": claim.source, "paper": claim.paper}
        for score in scores:
            if None in pair:
                records.append(about | {"score": score, "verdict": LEFT})
                continue
            found, seeds = difference(*pair, score, spreads[score]), _fewest(*pair)
            known = spreads[score].freedom or not any(row.trained for row in pair)
            verdict = _verdict(found, SCORES[score]) if known else ALONE
            records.append(about | {"score": score} | found | {"seeds": seeds, "verdict": verdict})
    columns = ["claim", "source", "paper", "score", "value", "low", "high", "seeds", "verdict"]
    return pd.DataFrame(records, columns=columns)


def _verdict(found: Mapping[str, float], better: int) -> str:
    if found["low"] <= 0 <= found["high"]:
        return NOISE
    return REPRODUCED if found["value"] * better > 0 else NOT_REPRODUCED
