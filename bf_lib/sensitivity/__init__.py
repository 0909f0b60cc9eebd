"""How sensitive each layer is to low bits (BitsFusion, §3.2): measured, and estimated."""

__all__ = [
    "FULL_PRECISION",
    "METHODS",
    "Candidate",
    "Estimate",
    "Sweep",
    "TrainedSweep",
    "Training",
    "candidates",
    "estimate",
    "leading_roles",
    "per_prompt",
    "quantized",
    "table",
]

from bf_lib.sensitivity.candidates import FULL_PRECISION, Candidate, candidates, quantized
from bf_lib.sensitivity.estimates import METHODS, Estimate, estimate
from bf_lib.sensitivity.sweep import Sweep
from bf_lib.sensitivity.tables import leading_roles, per_prompt, table
from bf_lib.sensitivity.trained import TrainedSweep, Training
