import json
import math

import numpy as np
import pytest
import torch

from bf_lib.claims import STATUSES, ClaimFailed, failures, gather, make_claim
from bf_lib.paths import ROOT
from bf_lib.run import Run
from bf_lib.study import Study


@pytest.fixture
def run(tmp_path):
    """A run that writes below a temporary folder, without what `start` changes globally."""
    return make_run(tmp_path)


def make_run(root, notebook="03_toy"):
    return Run(
        notebook=notebook,
        study=Study.of("mini"),
        seed=0,
        device=torch.device("cpu"),
        generator=torch.Generator(),
        root=root,
    )


def status(value, **bounds):
    made = make_claim("toy", value, kind="check", preset="mini", presets=("mini",), **bounds)
    return made.status


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0.5, {"low": 0.4, "high": 0.6}, "holds"),
        (0.4, {"low": 0.4, "high": 0.4}, "holds"),
        (0.7, {"low": 0.4, "high": 0.6}, "fails"),
        (0.3, {"low": 0.4}, "fails"),
        (0.7, {"high": 0.6}, "fails"),
        (0.5, {"low": 0.4, "expected": 0.9}, "holds"),  # bounds decide where there are any
        (256, {"expected": 256}, "holds"),
        (np.int64(255), {"expected": 256}, "fails"),
        ("conv", {"expected": "conv"}, "holds"),
        (True, {"expected": True}, "holds"),
        (math.nan, {"low": 0.0}, "fails"),
        (math.nan, {"high": 0.0}, "fails"),
        (math.nan, {"expected": 0.0}, "fails"),
        (None, {"low": 0.0}, "not attempted"),
    ],
)
def test_status(value, bounds, expected):
    assert status(value, **bounds) == expected


def test_a_claim_must_be_able_to_be_wrong():
    with pytest.raises(ValueError, match="'toy' needs low, high or expected"):
        status(1.0)


def test_a_comparison_that_differs_is_kept_and_passes(run):
    run.claim("share", 0.5, low=0.6, high=0.7, expected=0.685, source="Fig. 2")
    rows = run.finish()
    assert rows.status.tolist() == ["differs"]
    assert gather("mini", run.root).loc[0, ["name", "status", "notebook"]].tolist() == [
        *("share", "differs", "03_toy")
    ]


def test_failing_checks_raise_together_at_the_end_and_are_written(run):
    run.check("rows", 767, expected=768)
    run.check("error", np.float32("nan"), low=0.0, high=math.inf)
    run.check("holds", 1, expected=1)
    with pytest.raises(ClaimFailed) as caught:
        run.finish()
    assert "2 of this notebook's checks fail" in str(caught.value)
    assert "rows: got 767, expected 768" in str(caught.value)
    assert "error: got np.float32(nan), expected within [0, inf]" in str(caught.value)
    written = gather("mini", run.root).set_index("name")
    assert written.status.tolist() == ["fails", "fails", "holds"]
    assert written.value["error"] == "nan"
    assert (run.folder / "render.json").exists()


def test_claims_about_another_preset_are_not_attempted(run):
    run.claim("clip", 0.3, low=0.31, presets=("sd15",))
    run.check("only there", 3, expected=4, presets=("sd15",))
    rows = run.finish()
    assert rows.status.tolist() == ["not attempted", "not attempted"]
    assert rows.value.tolist() == ["", ""]
    assert gather("mini", run.root).value.isna().all()


def test_a_name_is_claimed_once(run):
    run.check("rows", 1, expected=1)
    with pytest.raises(ValueError, match="'rows' is made twice"):
        run.claim("rows", 1, expected=1)


def test_claims_of_all_notebooks_are_gathered_in_order(tmp_path):
    for notebook in ("03_toy", "01_toy"):
        one = make_run(tmp_path, notebook)
        one.claim(f"of {notebook}", 1.0, low=0.0, interval=(0.5, 1.5))
        one.finish()
    rows = gather("mini", tmp_path)
    assert rows.notebook.tolist() == ["01_toy", "03_toy"]
    assert rows.interval.tolist() == [[0.5, 1.5], [0.5, 1.5]]
    assert gather("smoke", tmp_path).empty
    assert list(gather("smoke", tmp_path).columns) == list(rows.columns)


def test_claims_are_shown_rounded(run):
    run.claim("share", 2 / 3, low=0.6, expected=0.685, interval=(0.61, 0.7244449), source="Fig. 2")
    run.check("rows", 768, expected=768)
    assert run.finish().values.tolist() == [
        ["share", "0.6667", "0.61 to 0.7244", "0.6", "", "0.685", "Fig. 2", "reproduced"],
        ["rows", "768", "", "", "", "768", "", "holds"],
    ]


def test_what_the_paper_says_nothing_of_is_not_reproduced_but_met(run):
    run.claim("reached", 1.0, low=0.5, aim=True)
    run.claim("not reached", 0.0, low=0.5, aim=True)
    run.claim("the paper's", 0.0, low=0.5)
    assert run.finish().status.tolist() == ["met", "missed", "differs"]


@pytest.mark.parametrize(
    ("interval", "bounds", "expected"),
    [
        ((0.4, 0.6), {"low": 0.3}, "reproduced"),
        ((0.4, 0.6), {"low": 0.4, "high": 0.6}, "reproduced"),
        ((0.4, 0.6), {"low": 0.45}, "inconclusive"),
        ((0.4, 0.6), {"high": 0.45}, "inconclusive"),
        ((0.4, 0.6), {"low": 0.3, "high": 0.55}, "inconclusive"),
        ((0.4, 0.6), {"low": 0.45, "high": 0.55}, "inconclusive"),
        ((0.4, 0.6), {"low": 0.7}, "differs"),
        ((0.4, 0.6), {"low": 0.1, "high": 0.3}, "differs"),
        ((math.nan, 0.6), {"low": 0.3}, "inconclusive"),
    ],
)
def test_an_interval_must_be_on_one_side(run, interval, bounds, expected):
    run.claim("share", 0.5, interval=interval, **bounds)
    run.check("a check is of its value", 0.5, interval=interval, low=0.5, high=0.5)
    assert run.finish().status.tolist() == [expected, "holds"]


def test_only_checks_fail():
    settings = {"preset": "mini", "presets": ("mini",), "low": 1.0}
    claims = [make_claim(kind, 0.0, kind=kind, **settings) for kind in STATUSES]
    assert [claim.name for claim in failures(claims)] == ["check"]


COMMITTED = sorted(ROOT.glob("data/runs/mini/*/claims.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=[path.parent.name for path in COMMITTED])
def test_committed_statuses_are_those_of_the_rule(path):
    """A rule that is changed asks for its notebooks to be run again."""
    for row in json.loads(path.read_text()):
        status = row.pop("status")
        assert make_claim(**row, presets=(row["preset"],)).status == status, row["name"]


def test_claims_are_committed():
    assert len(COMMITTED) >= 10
