"""Which time-steps are trained on (BitsFusion, §4.2).

A density is a probability for each time-step 0, ..., T - 1, with shape (T,) and sum 1, in float64.
"""

__all__ = ["beta", "draw_times", "fitted", "uniform"]

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import beta as beta_distribution
from torch import Tensor

STEPS = 1000  # T of SD's noise schedule


def uniform(steps: int = STEPS) -> Tensor:
    """Returns the density that is the same at all time-steps."""
    return torch.full((steps,), 1 / steps, dtype=torch.float64)


def beta(a: float, b: float = 1.0, steps: int = STEPS) -> Tensor:
    """Returns the density of t = floor(T x) for x of Beta(a, b).

    The paper takes Beta(3, 1), whose density is 3 x^2: late, noisy time-steps are seen more often.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a and b of a Beta distribution are positive, got {a} and {b}")
    edges = beta_distribution.cdf(np.linspace(0, 1, steps + 1), a, b)
    return torch.from_numpy(np.diff(edges))


def fitted(times: Sequence[int], errors: Sequence[float], steps: int = STEPS) -> Tensor:
    """Returns the density in proportion to an error that was measured at some time-steps.

    Between them it is interpolated linearly, and beyond the first and last it is theirs.

    Arguments:
        times: Time-steps, rising.
        errors: The error at each, not negative.
        steps: T.
    """
    values = np.asarray(errors, dtype=np.float64)
    if not (np.diff(times) > 0).all() or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("a density is fitted to errors of at least 0 at rising time-steps")
    found = np.interp(np.arange(steps), times, values)
    if found.sum() == 0:
        raise ValueError("there is no error to fit a density to")
    return torch.from_numpy(found / found.sum())


def draw_times(density: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws time-steps, one from each of `count` stretches of equal probability.

    Each has the density of independent ones, but those of one draw are spread evenly over it,
    which makes the mean of their losses less noisy.

    Returns:
        Time-steps with shape (count,), int64, rising.
    """
    quantile = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    found = torch.searchsorted(density.cumsum(0), quantile / count, right=True)
    return found.clamp_max(len(density) - 1)
