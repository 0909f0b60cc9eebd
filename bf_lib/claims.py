"""Claims: what the study says, as rows that can be wrong.

Three kinds, and one table. A *check* is something that must hold, or there is a bug: a notebook
whose check fails ends in an error. A *comparison* holds a value against the paper's: it may come
out `differs`, which is a result like any other and is never hidden. An *aim* is this study's own,
of which the paper says nothing; it is `met` or `missed`. Where a value of either has an interval,
all of it must be on one side of what agrees, or the status is `inconclusive`.
"""

__all__ = [
    "STATUSES",
    "Claim",
    "ClaimFailed",
    "Value",
    "gather",
    "make_claim",
    "readable",
    "table",
]

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from bf_lib.artifacts import load_json
from bf_lib.paths import ROOT, runs_folder

REPRODUCED, DIFFERS, NOT_ATTEMPTED = "reproduced", "differs", "not attempted"
HOLDS, FAILS = "holds", "fails"  # of checks
MET, MISSED = "met", "missed"  # of aims
INCONCLUSIVE = "inconclusive"  # of both

Kind = Literal["check", "comparison", "aim"]
STATUSES: dict[Kind, tuple[str, str]] = {
    "check": (HOLDS, FAILS),
    "comparison": (REPRODUCED, DIFFERS),
    "aim": (MET, MISSED),
}

Value = float | int | str | bool | None


class ClaimFailed(AssertionError):
    """One or more checks of a notebook do not hold."""

    def __init__(self, failed: Sequence["Claim"]) -> None:
        lines = [f"{claim.name}: got {claim.value!r}, {claim.wanted}" for claim in failed]
        super().__init__("\n".join([f"{len(failed)} of this notebook's checks fail", *lines]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of the table of claims."""

    name: str
    kind: Kind
    value: Value  # None when not attempted
    interval: tuple[float, float] | None  # of the value, usually 95 %
    low: float | None
    high: float | None
    expected: Value  # the paper's, or the exact value a check asks for
    source: str  # where in the paper
    preset: str
    status: str

    @property
    def wanted(self) -> str:
        """What the claim asks for, in words."""
        if self.low is None and self.high is None:
            return f"expected {self.expected!r}"
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return f"expected within [{low:g}, {high:g}]"


def make_claim(
    name: str,
    value: Value,
    *,
    kind: Kind,
    preset: str,
    presets: Sequence[str],
    low: float | None = None,
    high: float | None = None,
    expected: Value = None,
    interval: tuple[float, float] | None = None,
    source: str = "",
) -> Claim:
    """Returns a claim with its status.

    Arguments:
        name: What is claimed, unique within its notebook.
        value: What this run got; None says that it was not attempted.
        kind: A check, a comparison with the paper, or an aim of this study.
        preset: The preset of this run.
        presets: The presets that the claim is about; in others it is not attempted.
        low: The least value that agrees.
        high: The greatest value that agrees.
        expected: The paper's value. Without bounds, the only one that agrees.
        interval: The interval of the value, which decides in its place beside bounds, but for
            checks.
        source: The section, table or figure that it is compared with.
    """
    if low is None and high is None and expected is None:
        raise ValueError(f"claim {name!r} needs low, high or expected, or it cannot be wrong")
    if preset not in presets:
        value, interval = None, None
    return Claim(
        name=name,
        kind=kind,
        value=value,
        interval=interval,
        low=low,
        high=high,
        expected=expected,
        source=source,
        preset=preset,
        status=_status(kind, value, interval, low, high, expected),
    )


def _status(
    kind: Kind,
    value: Value,
    interval: tuple[float, float] | None,
    low: float | None,
    high: float | None,
    expected: Value,
) -> str:
    if value is None:
        return NOT_ATTEMPTED
    good, bad = STATUSES[kind]
    if low is None and high is None:
        return good if value == expected else bad
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    ends = (value,) if interval is None or kind == "check" else interval
    if all(low <= end <= high for end in ends):  # what is not a number does not pass
        return good
    one_side = len(ends) == 1 or all(end < low for end in ends) or all(end > high for end in ends)
    return bad if one_side else INCONCLUSIVE


def failures(claims: Iterable[Claim]) -> list[Claim]:
    """Returns the checks that do not hold."""
    return [claim for claim in claims if claim.status == FAILS]


def record(claims: Iterable[Claim]) -> list[dict[str, object]]:
    """Returns claims as JSON can hold them: numbers that are not finite become text."""
    return [
        asdict(claim)
        | {name: _writable(getattr(claim, name)) for name in ("value", "low", "high", "expected")}
        | {"interval": claim.interval and [_writable(end) for end in claim.interval]}
        for claim in claims
    ]


def _writable(value: Value) -> Value:
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """Returns records of claims as a table, one row each, in which a 3 stays a 3."""
    return pd.DataFrame(rows, columns=[field.name for field in fields(Claim)], dtype=object)


def readable(claims: pd.DataFrame) -> pd.DataFrame:
    """Returns a table of claims as a page shows it: a few columns, rounded, blank where none."""
    renamed = {"name": "claim", "low": "at least", "high": "at most"}
    columns = ["name", "value", "interval", "low", "high", "expected", "source", "status"]
    return claims[columns].map(_rounded).rename(columns=renamed)


def _rounded(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(_rounded(end) for end in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gather(preset: str, root: Path = ROOT) -> pd.DataFrame:
    """Returns all claims of a preset, notebook by notebook."""
    files = sorted(runs_folder(preset, "", root).glob("*/claims.json"))
    tables = [table(load_json(path)).assign(notebook=path.parent.name) for path in files]
    return pd.concat(tables, ignore_index=True) if tables else table([]).assign(notebook="")
