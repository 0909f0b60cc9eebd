"""Figures of recipes: what is drawn is what the tables say."""

import numpy as np
import pandas as pd
import pytest

from bf_lib import plots
from bf_lib.plots.recipes import METHODS

NAMES = [*METHODS, "random"]
ROWS = pd.DataFrame(
    [
        {"method": method, "stored_mb": 3.0 + n, "mse": 90.0 / (n + 1), "clip": 0.3, "scene": 0.8}
        for method in NAMES
        for n in (1, 0)  # not in order
    ]
)


def lines(axis):
    return {line.get_label(): line for line in axis.lines}


def test_a_frontier_has_a_line_a_method_in_order_of_size():
    figure = plots.frontier(ROWS, {"clip": 0.31, "scene": 0.9})
    assert [axis.get_title() for axis in figure.axes] == [
        *("MSE", "CLIP score", "scene score"),
    ]
    drawn = lines(figure.axes[0])
    assert set(drawn) == set(NAMES)  # full precision has no error to draw
    assert drawn["uniform"].get_xydata().tolist() == [[3.0, 90.0], [4.0, 45.0]]
    assert lines(figure.axes[1])["full precision"].get_ydata()[0] == 0.31


def test_without_a_scene_judge_there_is_one_axis_less():
    rows = ROWS.drop(columns="scene")
    assert len(plots.frontier(rows, {"clip": 0.31}).axes) == 2


def test_predictions_stand_beside_measurements():
    (axis,) = plots.additivity(ROWS.assign(predicted=ROWS.mse / 2)).axes
    assert lines(axis)["random"].get_xydata().tolist() == [[22.5, 45.0], [45.0, 90.0]]


def test_cumulative_damage_counts_layers_and_weights():
    rows = pd.DataFrame(
        {"share": [0.1, 1.0], "layers": [8, 256], "mse": [1.0, 50.0], "predicted": [1.0, 30.0]}
    )
    left, right = plots.cumulative_damage(rows).axes
    assert lines(left)["measured"].get_xdata().tolist() == [8, 256]
    assert lines(right)["sum of single layers"].get_xydata().tolist() == [[10, 1], [100, 30]]


def test_eta_has_intervals():
    rows = pd.DataFrame(
        [
            {"eta": eta, "score": score, "value": 2.0, "low": 1.0, "high": 4.0}
            for score in ("mse", "clip")
            for eta in (0.0, 0.3)
        ]
    )
    figure = plots.eta_study(rows)
    assert len(figure.axes) == 2
    segments = figure.axes[0].collections[0].get_segments()
    assert [s.tolist() for s in segments] == [[[e, 1.0], [e, 4.0]] for e in (0.0, 0.3)]


@pytest.mark.parametrize("column", ["role", "block"])
def test_two_recipes_are_compared(column):
    names = ["ff.in", "resnet.conv1"] if column == "role" else ["down0", "up3"]
    rows = pd.DataFrame({column: names, "published": [1.8, 2.5], "ours": [2.0, 1.0]})
    (axis,) = plots.roles_compared(rows, column).axes
    top = names[::-1] if column == "role" else names
    assert [label.get_text() for label in axis.get_yticklabels()] == top


def test_blocks_add_up():
    parts = pd.DataFrame(
        [
            *(("mid", "codes", 3e6), ("mid", "scales", 1e6), ("up0", "codes", 2e6)),
            *(("conv_out", "codes", 2e3), ("time_proj", "codes", 0)),
        ],
        columns=["block", "kind", "stored_bytes"],
    )
    (axis,) = plots.block_sizes(parts).axes
    assert [text.get_text() for text in axis.texts] == ["4.00", "2.00", "2.0 kB"]
    assert sum(patch.get_width() for patch in axis.patches) == pytest.approx(6.002)


def test_time_layers_stand_beside_the_median_of_sets():
    rows = pd.DataFrame(
        [
            {"part": part, "bits": b, "mse": value / b}
            for part, value in {
                "time layers": 9.0,
                "set 1": 1.0,
                "set 2": 2.0,
                "set 3": 6.0,
            }.items()
            for b in (1, 2)
        ]
    )
    (axis,) = plots.time_damage(rows).axes
    drawn = lines(axis)
    assert np.array_equal(drawn["time layers"].get_ydata(), [9.0, 4.5])
    assert np.array_equal(drawn["their median"].get_ydata(), [2.0, 1.0])


def test_features_are_drawn_over_time():
    values = [[0.0, 1.0, -3.0], [0.0, 2.0, -1.0]]  # two steps, of three features
    figure = plots.time_map([25.0, 975.0], values)
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0, 0], [1, 2], [-3, -1]]  # by what they gain
    assert image.get_extent()[:2] == [25, 975] and image.get_clim() == (-3, 3)
