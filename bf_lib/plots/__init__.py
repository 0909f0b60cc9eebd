"""Figures: functions of tables, so that each can be drawn again without computing anything."""

__all__ = [
    "FAMILIES",
    "METHODS",
    "METRICS",
    "additivity",
    "block_sizes",
    "code_bits",
    "correlation_heatmaps",
    "cumulative_damage",
    "decoding",
    "differences",
    "error_by_layer",
    "error_by_levels",
    "estimate_scatter",
    "eta_study",
    "family_of",
    "fidelity",
    "frontier",
    "layer_bits",
    "layer_card",
    "losses",
    "paper_intervals",
    "parameters_by_block",
    "parameters_by_depth",
    "parameters_by_role",
    "pull_scatter",
    "reliability_bars",
    "roles_compared",
    "scatter_matrix",
    "scores",
    "sensitivity_bars",
    "sensitivity_by_role",
    "short",
    "steps_to_converge",
    "stored_by",
    "time_damage",
    "time_errors",
    "time_map",
    "trained_frontier",
    "training_curves",
    "training_gain",
    "training_scatter",
    "weight_histograms",
]

from bf_lib.plots.anatomy import parameters_by_block, parameters_by_depth, parameters_by_role
from bf_lib.plots.correlation import (
    correlation_heatmaps,
    paper_intervals,
    pull_scatter,
    reliability_bars,
    scatter_matrix,
)
from bf_lib.plots.estimates import (
    estimate_scatter,
    fidelity,
    training_gain,
    training_scatter,
)
from bf_lib.plots.families import FAMILIES, family_of, short
from bf_lib.plots.grids import (
    error_by_layer,
    error_by_levels,
    steps_to_converge,
    weight_histograms,
)
from bf_lib.plots.packed import code_bits, decoding, layer_bits, stored_by
from bf_lib.plots.recipes import (
    METHODS,
    additivity,
    block_sizes,
    cumulative_damage,
    eta_study,
    frontier,
    roles_compared,
)
from bf_lib.plots.sensitivity import METRICS, layer_card, sensitivity_bars, sensitivity_by_role
from bf_lib.plots.students import differences, scores, trained_frontier
from bf_lib.plots.times import time_damage, time_map
from bf_lib.plots.training import losses, time_errors, training_curves
