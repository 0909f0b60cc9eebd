"""Figures: functions of tables, so that each can be drawn again without computing anything."""

__all__ = [
    "FAMILIES",
    "METRICS",
    "error_by_layer",
    "error_by_levels",
    "family_of",
    "layer_card",
    "parameters_by_block",
    "parameters_by_depth",
    "parameters_by_role",
    "sensitivity_bars",
    "sensitivity_by_role",
    "short",
    "steps_to_converge",
    "training_curves",
    "weight_histograms",
]

from bf_lib.plots.anatomy import parameters_by_block, parameters_by_depth, parameters_by_role
from bf_lib.plots.families import FAMILIES, family_of, short
from bf_lib.plots.grids import (
    error_by_layer,
    error_by_levels,
    steps_to_converge,
    weight_histograms,
)
from bf_lib.plots.sensitivity import METRICS, layer_card, sensitivity_bars, sensitivity_by_role
from bf_lib.plots.training import training_curves
