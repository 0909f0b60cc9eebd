"""What the paper says of its parts, and what the ablation found of each (Tables 3 to 7)."""

__all__ = ["CLAIMS", "MARGINS", "PaperClaim", "claim_table", "claims_beside_teacher"]

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from scipy.stats import false_discovery_control

from bf_lib.ablation_study import SCORES, Finished, Spread, difference, fewest

CLAIMED = ("clip", "passed")  # what the paper's claims are about, and what is like it
# By how much a student may be worse than its teacher, for all we know, and still count as good.
MARGINS = {"passed": 0.02, "clip": 0.01}
BETTER = {"passed": "Table 8", "clip": "Table 4"}  # where the paper's student is better
REPRODUCED, NOT_REPRODUCED = "reproduced on mini", "not reproduced"
NOISE, LEFT = "not distinguishable from noise", "not finished"
ALONE = "one training each"
LIMIT = 0.05  # of the share of differences that are told apart by chance
ABOUT = ("claim", "better", "worse", "source", "paper")


@dataclass(frozen=True, slots=True)
class PaperClaim:
    """One row of the ablation is better than another, the paper says."""

    claim: str
    better: str
    worse: str
    paper: float | None  # by how much of the CLIP score
    source: str


ACROSS = "Table 4 over Table 3"

# The gains of Table 4 are those of its means over four guidance scales; that of its last row is
# .3193, and not .3183 as printed. Those over others' methods are of a guidance of 7.5, after Stage
# I, which has the steps that these have here.
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
    PaperClaim(
        "Stage II, at Stage I's rate",
        "+ Stage II at 3e-4",
        "+ time-step sampling",
        0.0037,
        "Table 4",
    ),
    PaperClaim("better than full precision", "+ Stage II", "full precision", 0.0037, "Table 4"),
    PaperClaim("lambda of .01 over .1", "3 levels", "3 levels, lambda 0.1", 0.0022, "Table 6"),
    PaperClaim("lambda of .01 over 1", "3 levels", "3 levels, lambda 1", 0.0017, "Table 6"),
    PaperClaim("alpha of 3 over 1.5", "3 levels", "3 levels, alpha 1.5", 0.0012, "Table 7"),
    PaperClaim("alpha of 3 over 2", "3 levels", "3 levels, alpha 2", 0.0008, "Table 7"),
    PaperClaim("eta of .3 over 0", "eta 0.3", "eta 0", 0.0026, "Table 5"),
    PaperClaim("eta of .3 over .5", "eta 0.3", "eta 0.5", 0.0013, "Table 5"),
    PaperClaim("over LSQ of 2 bits", "+ time-step sampling", "QAT-Base", 0.0332, ACROSS),
    PaperClaim(
        "over LoRA of 2 bits (EfficientDM)",
        "+ time-step sampling",
        "LoRA, 2 bits",
        0.0263,
        ACROSS,
    ),
    PaperClaim(
        "over reconstruction at 4 bits (Q-Diffusion)",
        "+ time-step sampling",
        "reconstruction, 4 bits",
        0.0044,
        ACROSS,
    ),
    PaperClaim(
        "over palettes of 2 bits", "+ time-step sampling", "palettes, 2 bits", 0.0158, ACROSS
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
    PaperClaim(
        "Stage II at Stage I's rate, 3 levels",
        "3 levels, Stage II at 3e-4",
        "3 levels",
        0.0037,
        "Table 4",
    ),
)


def claim_table(
    rows: Mapping[str, Finished],
    claims: Sequence[PaperClaim] = CLAIMS,
    scores: Sequence[str] = CLAIMED,
) -> pd.DataFrame:
    """Says for each claim of the paper what the ablation found.

    So many differences cannot be taken one by one: of twenty intervals one is beside zero by
    chance. Their p-values are therefore adjusted for all of the table (Benjamini and Hochberg,
    1995): of the differences with q below `LIMIT`, at most that share is expected to be there by
    chance, if tests are independent or go together, as most of these do.

    Returns:
        Columns claim, better, worse (the rows), source, paper (of the CLIP score), score, value,
        low, high (95 %), seeds (the fewer of both rows), p, q and verdict: "reproduced on mini" if
        q is below `LIMIT` and the difference is of the claim's sign, "not reproduced" if it is of
        the other, else "not distinguishable from noise"; "not finished" where a row is missing.
        Where there is but one training each, it says so, and nothing else as long as no row has
        two.
    """
    spreads = {score: Spread.of(rows, score) for score in scores}
    records = []
    for claim in claims:
        pair = rows.get(claim.better), rows.get(claim.worse)
        about = {field: getattr(claim, field) for field in ABOUT}
        for score in scores:
            record = about | {"score": score}
            if None not in pair:
                record |= difference(*pair, score, spreads[score])
                record["seeds"] = fewest(*pair)
                record["alone"] = record["seeds"] == 1 and any(row.trained for row in pair)
            records.append(record)
    columns = [*ABOUT, "score", "value", "low", "high", "seeds", "p", "alone"]
    table = pd.DataFrame(records, columns=columns).assign(q=math.nan)
    known = table.p.notna()
    if known.any():
        table.loc[known, "q"] = false_discovery_control(table.p[known])
    verdicts = [_verdict(row, spreads[row.score]) for row in table.itertuples()]
    return table.drop(columns="alone").assign(verdict=verdicts)


def _verdict(row: object, spread: Spread) -> str:
    if math.isnan(row.seeds):
        return LEFT
    if row.alone and not spread.freedom:
        return ALONE
    verdict = NOISE
    if row.q < LIMIT:
        verdict = REPRODUCED if row.value * SCORES[row.score] > 0 else NOT_REPRODUCED
    return f"{verdict}, {ALONE}" if row.alone else verdict


def claims_beside_teacher(
    student: str, gains: Mapping[str, Mapping[str, float]]
) -> Iterator[dict[str, object]]:
    """Yields what is asked of a student beside its teacher, as arguments of `Run.claim`.

    That it is better, as the paper's is, and, as an aim of this study, that it is not worse by
    more than `MARGINS`.

    Arguments:
        student: What to call it.
        gains: By score of `MARGINS`, the value, low and high of its gain over the teacher.
    """
    for score, gain in gains.items():
        about = {"value": gain["value"], "interval": (gain["low"], gain["high"])}
        yield about | {
            "name": f"{score}: gain of {student} over full precision, better",
            "low": 0.0,
            "source": BETTER[score],
        }
        yield about | {
            "name": f"{score}: gain of {student} over full precision, not worse",
            "low": -MARGINS[score],
            "aim": True,
        }
