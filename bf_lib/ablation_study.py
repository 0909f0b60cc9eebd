"""What the ablation says: rows with intervals, differences, and the paper's claims about them."""

__all__ = [
    "CLAIMS",
    "SCORES",
    "Finished",
    "PaperClaim",
    "bootstrap",
    "claim_table",
    "difference",
    "difference_table",
    "finished",
    "row_table",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bf_lib.ablation import Ablation, record_of, state_of

# score of a prompt -> 1 if more is better, -1 if less is
SCORES = {"clip": 1, "passed": 1, "mse": -1}
SIZES = ("paper_bits", "stored_bits", "stored_mb", "coded_bits")
SAMPLES = 2000  # of a bootstrap
REPRODUCED, NOT_REPRODUCED = "reproduced on mini", "not reproduced"
NOISE, LEFT = "not distinguishable from noise", "not finished"


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A row with all of its seeds that are done."""

    name: str
    group: str
    paper_bits: float
    stored_bits: float
    stored_mb: float
    coded_bits: float  # of the entropy-coded file, if there is one; a mean over trainings
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
            found[row.name] = Finished(row.name, row.group, **sizes, scores=scores)
    return found


def bootstrap(first: np.ndarray, second: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Resamples a mean, or the difference of two means, over trainings and prompts.

    Prompts are resampled together, since both sides draw the same ones from the same seeds;
    trainings are resampled by themselves. Means of n trainings that are resampled vary by a factor
    (n - 1) / n too little, which with three is much, so their deviations are stretched by as much.

    Arguments:
        first: Scores with shape (trainings, prompts).
        second: What is to be subtracted, with as many prompts.
        seed: Of the resampling.

    Returns:
        The resampled values, with shape (samples,).
    """
    rng = np.random.default_rng(seed)
    prompts = first.shape[1]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), SAMPLES) / prompts

    def means(scores: np.ndarray) -> np.ndarray:
        count = len(scores)
        trainings = rng.multinomial(count, np.full(count, 1 / count), SAMPLES) / count
        stretched = (trainings - 1 / count) * (count / max(1, count - 1)) ** 0.5 + 1 / count
        return ((weights @ scores.T) * stretched).sum(axis=1)

    return means(first) - (0 if second is None else means(second))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def difference(first: Finished, second: Finished, score: str) -> dict[str, float]:
    """Returns by how much the first row's mean is above the second's, with its 95 % interval."""
    a, b = first.scores[score], second.scores[score]
    low, high = _interval(bootstrap(a, b))
    return {"value": float(a.mean() - b.mean()), "low": low, "high": high}


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
    records = [
        {"name": a, "over": b, "seeds": min(rows[a].seeds, rows[b].seeds), "score": score}
        | difference(rows[a], rows[b], score)
        for score in scores
        for a, b in pairs
        if a in rows and b in rows
    ]
    return pd.DataFrame(records, columns=columns)


def row_table(rows: Mapping[str, Finished]) -> pd.DataFrame:
    """Returns a row for each row and score.

    Returns:
        Columns row, group, seeds, paper_bits, stored_bits, stored_mb, coded_bits, score, value,
        low and high (95 %, over trainings and prompts).
    """
    records = []
    for row in rows.values():
        about = {"row": row.name, "group": row.group, "seeds": row.seeds}
        about |= {name: getattr(row, name) for name in SIZES}
        for score, values in row.scores.items():
            low, high = _interval(bootstrap(values))
            found = {"score": score, "value": float(values.mean()), "low": low, "high": high}
            records.append(about | found)
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
        "CFG-aware distillation over noise prediction",
        "3 levels",
        "3 levels, noise predicted in Stage I",
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
        from noise"; "not finished" where a row is missing.
    """
    records = []
    for claim in claims:
        pair = rows.get(claim.better), rows.get(claim.worse)
        about = {"claim": claim.claim, "source": claim.source, "paper": claim.paper}
        for score in scores:
            if None in pair:
                records.append(about | {"score": score, "verdict": LEFT})
                continue
            found = difference(*pair, score)
            seeds = min(row.seeds for row in pair)
            verdict = _verdict(found, SCORES[score])
            records.append(about | {"score": score} | found | {"seeds": seeds, "verdict": verdict})
    columns = ["claim", "source", "paper", "score", "value", "low", "high", "seeds", "verdict"]
    return pd.DataFrame(records, columns=columns)


def _verdict(found: Mapping[str, float], better: int) -> str:
    if found["low"] <= 0 <= found["high"]:
        return NOISE
    return REPRODUCED if found["value"] * better > 0 else NOT_REPRODUCED
