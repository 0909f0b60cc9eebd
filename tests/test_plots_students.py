"""Figures of students show the numbers of their tables."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bf_lib import plots
from bf_lib.paths import ROOT

NAMES = ["full precision", "not trained", "Stage I"]


@pytest.fixture(autouse=True)
def look():
    with plt.style.context(ROOT / "bf_lib" / "bf.mplstyle"):
        yield
    plt.close("all")


@pytest.fixture
def rows():
    records = [
        {"name": name, "score": score, "value": 0.1 * i + j, "low": 0.1 * i + j - 0.05}
        for j, score in enumerate(["passed", "mse"], 1)
        for i, name in enumerate(NAMES)
    ]
    return pd.DataFrame(records).assign(high=lambda table: table.value + 0.03)


def dots(axis):
    return next(line for line in axis.lines if line.get_marker() == "o")


def test_scores_have_a_line_each_and_the_reference_across(rows):
    left, right = plots.scores(rows).axes
    assert dots(left).get_xdata().tolist() == pytest.approx([1.0, 1.1, 1.2])
    assert [label.get_text() for label in left.get_yticklabels()] == NAMES
    assert left.yaxis_inverted()  # the first row is on top
    spread = np.array(left.collections[0].get_segments())[:, :, 0]
    assert spread == pytest.approx(np.array([[0.95, 1.03], [1.05, 1.13], [1.15, 1.23]]))
    across = [line for line in left.lines if line is not dots(left)]
    assert [line.get_xdata()[0] for line in across] == [1.0]
    assert len(right.lines) == 1  # there is no error of the reference to itself


def test_differences_are_seen_beside_zero(rows):
    for axis in plots.differences(rows).axes:
        zero = next(line for line in axis.lines if line is not dots(axis))
        assert set(zero.get_xdata()) == {0}
    left, right = plots.differences(rows, {"passed": 0.02}).axes
    assert [line.get_xdata()[0] for line in left.lines if line.get_linestyle() == ":"] == [-0.02]
    assert all(line.get_linestyle() != ":" for line in right.lines)


def test_ten_groups_of_rows_can_be_told_apart(rows):
    named = [rows[rows.name == "Stage I"].assign(row=f"row {n}", bits=2.0 + n) for n in range(10)]
    groups = {f"group {n}": [f"row {n}"] for n in range(10)}
    figure = plots.trained_frontier(pd.concat(named), groups)
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 10


def test_the_frontier_is_drawn_by_size_and_without_rows_that_are_not_there(rows):
    sizes = {"full precision": 16.0, "not trained": 2.0, "Stage I": 1.8}
    table = rows.rename(columns={"name": "row"})
    table["bits"] = table.row.map(sizes)
    groups = {"students": ["not trained", "Stage I", "not finished"], "others": ["not finished"]}
    left, right = plots.trained_frontier(table, groups).axes
    drawn = left.containers[0].lines[0]
    assert drawn.get_xdata().tolist() == [1.8, 2.0]
    assert drawn.get_ydata().tolist() == pytest.approx([1.2, 1.1])
    assert right.get_yscale() == "log" and len(right.patches) == 0 and len(left.patches) == 1


def test_losses_have_a_panel_each_and_scales_that_suit_them():
    log = pd.DataFrame({"step": [20, 40], "lr": [1e-3, 1e-3], "loss": [2.0, 0.9]})
    log = log.assign(noise=[1.0, 0.8], seconds_per_step=1.0)
    axes = plots.losses(log).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["loss", "noise"]
    assert axes[1].lines[0].get_ydata().tolist() == [1.0, 0.8]
    assert [axis.get_yscale() for axis in axes] == ["log", "linear"]


def test_a_part_that_is_all_of_the_loss_is_not_shown_again():
    log = pd.DataFrame({"step": [20, 40], "lr": [1e-3, 1e-3], "loss": [2.0, 0.9]})
    assert len(plots.losses(log.assign(noise=log.loss, seconds_per_step=1.0)).axes) == 1
