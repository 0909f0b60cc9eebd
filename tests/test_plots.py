"""Figures show the numbers of their tables."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from toys import toy_unet

from bf_lib import artifacts, pictures, plots
from bf_lib.layers import list_layers
from bf_lib.models import meta_unet, sd15_unet_config
from bf_lib.paths import ROOT
from bf_lib.protocol import study_layers
from bf_lib.sensitivity import correlation
from bf_lib.study import Study


@pytest.fixture(autouse=True)
def look():
    with plt.style.context(ROOT / "bf_lib" / "bf.mplstyle"):
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def layers():
    return pd.DataFrame(vars_of(toy_unet()))


@pytest.fixture(scope="module")
def sd15():
    return pd.DataFrame(vars_of(meta_unet(sd15_unet_config())))


def vars_of(unet):
    return [
        {"layer": x.name, "role": x.role, "block": x.block, "depth": x.depth, "params": x.params}
        for x in list_layers(unet)
    ]


@pytest.fixture(scope="module")
def rows(layers):
    rng = np.random.default_rng(0)
    table = pd.concat([layers.assign(bits=b) for b in (1, 2, 3)], ignore_index=True)
    for metric in plots.METRICS:
        table[metric] = rng.lognormal(size=len(table))
    return table


def heights(axis):
    return [patch.get_height() for patch in axis.patches]


def test_every_role_has_a_family_with_a_colour_of_its_own(sd15):
    assert set(map(plots.family_of, sd15.role)) <= set(plots.FAMILIES)
    assert len(set(plots.FAMILIES.values())) == len(plots.FAMILIES)
    with pytest.raises(KeyError):
        plots.family_of("no such role")


def test_short_names_stay_apart(sd15):
    assert plots.short("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == (
        "down.1.attn.0.attn2.to_k"
    )
    assert plots.short("mid_block.resnets.1.conv1") == "mid.res.1.conv1"
    assert sd15.layer.map(plots.short).is_unique


@pytest.mark.parametrize("metric", plots.METRICS)
def test_sensitivity_bars_are_the_metric_in_order_of_execution(rows, metric):
    figure = plots.sensitivity_bars(rows, metric)
    assert len(figure.axes) == 3
    for bits, axis in zip((1, 2, 3), figure.axes, strict=True):
        wanted = rows[rows.bits == bits].sort_values("depth")[metric]
        np.testing.assert_allclose(heights(axis), wanted)
    figure.canvas.draw()


def test_labels_of_blocks_stay_apart(rows):
    figure = plots.sensitivity_bars(rows, "mse")
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels(which="both")]
    assert len(labels) == 9
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])


def test_sensitivity_by_role_shows_each_layer_once(rows):
    figure = plots.sensitivity_by_role(rows, bits=2)
    figure.canvas.draw()
    part = rows[rows.bits == 2]
    for axis, metric in zip(figure.axes, ("mse", "clip_drop"), strict=True):
        shown = np.concatenate([c.get_offsets().data[:, 0] for c in axis.collections])
        np.testing.assert_allclose(np.sort(shown), np.sort(part[metric]))


def test_shares_of_parameters_add_up(layers, sd15):
    for draw in (plots.parameters_by_role, plots.parameters_by_block):
        figure = draw(layers, sd15, "toy")
        figure.canvas.draw()
        for axis in figure.axes:
            sizes = [
                p.get_width() if draw is plots.parameters_by_role else p.get_height()
                for p in axis.patches
            ]
            assert sum(sizes) == pytest.approx(100)
    figure = plots.parameters_by_depth(layers)
    assert heights(figure.axes[0]) == layers.params.tolist()
    figure.canvas.draw()


def test_a_layer_card_marks_its_layer(rows):
    name = rows.layer[7]
    images = {"full precision": np.zeros((4, 8, 8, 3), dtype=np.uint8)}
    figure = plots.layer_card(name, 1, np.linspace(-2, 2, 50), rows, images)
    figure.canvas.draw()
    axis = figure.axes[-1]
    (x,), (y,) = axis.lines[1].get_data()
    part = rows[rows.bits == 1]
    assert y == part.mse[part.layer == name].item()
    assert x == (part.mse < y).sum()


def test_figures_of_a_few_layers_can_be_drawn(rows):
    few = study_layers(Study.of("smoke"), list_layers(toy_unet()))
    part = rows[rows.layer.isin([layer.name for layer in few])].reset_index(drop=True)
    figure = plots.sensitivity_bars(part, "mse")
    figure.canvas.draw()
    assert plots.parameters_by_depth(part[part.bits == 1])


def test_curves_of_grids():
    methods = ["plain minmax", "plain alternating", "shifted alternating"]
    methods += ["minmax", "alternating", "optimal"]
    errors = pd.DataFrame(
        [
            (f"layer {i}", method, levels, 0.5 / levels**2 * (1 + 0.1 * i))
            for i in range(3)
            for method in methods
            for levels in (3, 5, 9)
        ],
        columns=["layer", "method", "levels", "relative_mse"],
    )
    figure = plots.error_by_levels(errors)
    figure.canvas.draw()
    right = figure.axes[1]
    for line in right.lines[: len(methods)]:
        bits, gap = line.get_data()
        np.testing.assert_allclose(bits, np.log2([3, 5, 9]))
        # 10 log10(D 2^(2 b)) with D = 0.55 / L^2 and b = log2 L
        np.testing.assert_allclose(gap, 10 * np.log10(0.55), atol=1e-9)

    excess = pd.DataFrame(
        [
            (levels, step, 0.1 / (step + 1), step / 20 * channels)
            for levels in (3, 5)
            for step in (0, 5, 10)
            for channels in (1, 2)  # of two layers
        ],
        columns=["levels", "steps", "excess", "settled"],
    )
    left, right = plots.steps_to_converge(excess).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [10, 10 / 6, 10 / 11])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0, 37.5, 75])


def test_each_layer_has_a_mark_on_each_balanced_grid(layers):
    tables = [
        layers.assign(method=method, levels=levels, relative_mse=error + layers.depth / 1000)
        for levels in (2, 3, 5)
        for method, error in (("minmax", 0.4), ("optimal", 0.2))
    ]
    figure = plots.error_by_layer(pd.concat(tables, ignore_index=True))
    figure.canvas.draw()
    assert len(figure.axes) == 2  # a plain grid, which has 2 levels, is left out
    for axis in figure.axes:
        for line, error in zip(axis.lines[:2], (0.4, 0.2), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), layers.depth)
            np.testing.assert_allclose(line.get_ydata(), error + layers.depth / 1000)


def test_dots_are_the_same_each_time(rows):
    first, second = (artifacts._render(plots.sensitivity_by_role(rows), "png") for _ in range(2))
    assert first == second


def test_levels_stand_where_the_scale_puts_them():
    weights = pd.DataFrame({"channel": "a", "weight": np.linspace(-1, 1, 30)})
    scales = pd.DataFrame(
        [("a", "minmax", 5, 0.5), ("a", "optimal", 3, 0.4)],
        columns=["channel", "method", "levels", "scale"],
    )
    axis = plots.weight_histograms(weights, scales).axes[0]
    assert axis.lines[0].get_xdata().tolist() == pytest.approx([-1.0, -0.5, 0, 0.5, 1.0])
    assert axis.lines[1].get_xdata().tolist() == pytest.approx([-0.4, 0, 0.4])


def test_training_curves_are_the_losses():
    logs = {
        name: pd.DataFrame({"step": [1, 2], "loss": [v, v / 2]})
        for name, v in (("a", 3), ("b", 9))
    }
    figure = plots.training_curves(**logs)
    assert [axis.lines[0].get_ydata().tolist() for axis in figure.axes] == [[3, 1.5], [9, 4.5]]


def test_captions_stay_under_their_own_image():
    images = np.zeros((9, 8, 8, 3), dtype=np.uint8)
    captions = ["there is a large purple triangle in front of a sand background"] * 9
    figure = pictures.captioned(images, captions)
    figure.canvas.draw()
    boxes = [axis.texts[0].get_window_extent() for axis in figure.axes if axis.texts]
    frames = [axis.get_window_extent() for axis in figure.axes[: len(images)]]
    assert len(boxes) == len(images)
    for i, box in enumerate(boxes):
        assert box.y0 >= 0
        assert not any(box.overlaps(other) for j, other in enumerate(boxes) if j != i)
        assert not any(box.overlaps(frame) for j, frame in enumerate(frames) if j != i)


def test_rows_of_images_hold_all_images():
    rows = {
        "a": np.zeros((3, 8, 8, 3), dtype=np.uint8),
        "b": np.zeros((2, 8, 8, 3), dtype=np.uint8),
    }
    figure = pictures.image_rows(rows, below=["one", "two", "three"])
    figure.canvas.draw()
    assert sum(len(axis.images) for axis in figure.axes) == 5


# ---- correlations


@pytest.fixture(scope="module")
def tables(rows):
    return correlation.between_metrics(rows), correlation.between_bits(rows)


def test_heatmaps_show_pearson_below_and_spearman_above(tables):
    metrics, bits = tables
    figure = plots.correlation_heatmaps(metrics, bits)
    axes = figure.axes
    assert [axis.get_title(loc="left") for axis in axes[:3]] == ["1 bit", "2 bits", "3 bits"]
    assert len(axes) == 3 + 4
    image = axes[1].images[0].get_array()
    row = metrics.set_index(["first", "second", "bits"]).loc["mse", "psnr", 2]
    assert image[1, 0] == pytest.approx(abs(row.pearson))
    assert image[0, 1] == pytest.approx(abs(row.spearman))
    # of bit-widths: CLIP drop comes last, 3 bits against 1
    image = axes[-1].images[0].get_array()
    row = bits[(bits.metric == "clip_drop") & (bits.bits == 1) & (bits.other_bits == 3)].iloc[0]
    assert image[2, 0] == pytest.approx(abs(row.pearson))


def test_the_paper_stands_beside_our_intervals(tables):
    beside = [correlation.beside_paper(table) for table in tables]
    figure = plots.paper_intervals(*beside)
    for axis, table in zip(figure.axes, beside, strict=True):
        ours, papers = axis.lines[:2]
        np.testing.assert_allclose(ours.get_xdata(), table.ours)
        np.testing.assert_allclose(papers.get_xdata(), table.paper)
        ends = np.array([segment[:, 0] for segment in axis.collections[0].get_segments()])
        np.testing.assert_allclose(ends, table[["low", "high"]])
        assert len(axis.get_yticklabels()) == len(table)


def test_the_scatter_matrix_shows_each_pair_once(rows):
    figure = plots.scatter_matrix(rows, 2)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 6
    part = rows[rows.bits == 2]
    np.testing.assert_allclose(
        shown[0].collections[0].get_offsets(), part[["mse", "psnr"]].to_numpy()
    )


def test_layers_that_pull_are_named(rows):
    pulls = correlation.influence(rows, "mse", "clip_drop", 1)
    axis = plots.pull_scatter(pulls, "mse", "clip_drop", named=2).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert texts == [
        f"{plots.short(row.layer)}: {row.pull:+.2f}" for row in pulls.head(2).itertuples()
    ]
    sizes = axis.collections[0].get_sizes()
    assert sizes[0] == sizes.max()


def test_bars_of_reliability_have_their_intervals():
    table = pd.DataFrame(
        [
            {"metric": m, "bits": b, "icc": 0.5 + 0.1 * b, "low": 0.2, "high": 0.9}
            for m in plots.METRICS
            for b in (1, 2)
        ]
    )
    axis = plots.reliability_bars(table).axes[0]
    each = len(plots.METRICS)
    assert heights(axis) == pytest.approx([0.6] * each + [0.7] * each)
    assert len(axis.collections[0].get_segments()) == each


# ---- estimates and trained candidates


def test_fidelity_is_shown_by_method_with_its_ceiling():
    table = pd.DataFrame(
        [
            {"method": m, "share": s, "metric": metric, "bits": b}
            | {"spearman": 0.9 - s, "low": 0.8 - s, "high": 0.95 - s}
            for m in ("image gradient", "single step")
            for s in (0.001, 0.01)
            for metric in ("mse", "clip_drop")
            for b in ("1", "2", "all")
        ]
    )
    ceilings = pd.DataFrame(
        [
            {"metric": metric, "bits": b, "ceiling": 0.99}
            for metric in ("mse", "clip_drop")
            for b in ("1", "2", "all")
        ]
    )
    figure = plots.fidelity(table, ceilings, "mse")
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "1 bit",
        "2 bits",
        "all together",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["image gradient"].get_xdata(), [0.1, 1.0])
    np.testing.assert_allclose(lines["image gradient"].get_ydata(), [0.899, 0.89])
    assert lines["root of the sweep's reliability"].get_ydata()[0] == 0.99


@pytest.mark.parametrize(
    ("draw", "x", "y"),
    [("estimate_scatter", "error", "mse"), ("training_scatter", "mse", "mse_trained")],
)
def test_what_is_compared_lies_about_a_line(rows, draw, x, y):
    table = rows.assign(**{x: rows.mse, y: 2 * rows.mse})
    axes = getattr(plots, draw)(table).axes
    part = table[table.bits == 2]
    np.testing.assert_allclose(axes[1].collections[0].get_offsets(), part[[x, y]])
    line = axes[1].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())


def test_what_training_takes_is_shown_by_role(rows):
    table = rows.assign(taken=np.linspace(-0.5, 1, len(rows)))
    axis = plots.training_gain(table).axes[0]
    found = np.concatenate([dots.get_offsets()[:, 0] for dots in axis.collections])
    np.testing.assert_allclose(np.sort(found), 100 * np.sort(table.taken))
    medians = table.groupby("role").taken.median().sort_values(ascending=False)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(medians.index)
