"""The exact least-squares scale of a balanced grid, by branch and bound over its breakpoints.

For the magnitudes `a` of one output channel and codes `q` in 0..M, the error to minimise over the
scale `s` is (Eq. 4 of BitsFusion on a balanced grid, where signs cancel)

    f(s) = min_q |a - s q|^2 = |a|^2 - max_q (2 s A - s^2 B),   A = <a, q>,   B = <q, q>

The best codes change only where s passes a breakpoint a_i / (k - 1/2), so the global minimum is
|a|^2 - max A^2 / B over the breakpoints, reached at s = A / B. There are M n of them; two facts
make the search fast:

- With `a` sorted and its running sums at hand, A and B at any s take M binary searches.
- sqrt(f) is the distance from `a` to the scaled grid s Q, hence for s' = rho s it is at least
  rho sqrt(f(s)) - |rho - 1| |a|. A few coarse grids of scales therefore rule out all but a narrow
  range, and only the breakpoints within that range are visited one by one.
"""

__all__ = ["least_squares_scale"]

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PASSES = 3  # coarse grids, each within the range that the last one left
POINTS = 64  # scales per coarse grid


class Ranked(NamedTuple):
    """The magnitudes of each channel in rising order, and sums over them in float64."""

    values: Tensor  # (rows, n)
    sums: Tensor  # (rows, n + 1); column i adds up the i smallest
    energy: Tensor  # (rows, 1); |a|^2


def least_squares_scale(magnitudes: Tensor, bound: int) -> Tensor:
    """Returns the scale s that minimises |a - s q|^2 over s > 0 and codes q in 0..bound, per row.

    The minimum is global, up to rounding in float64.

    Arguments:
        magnitudes: Non-negative finite numbers, with shape (rows, n). No row is all zero.
        bound: The largest code M, at least 1.

    Returns:
        The scales in float64, with shape (rows, 1).
    """
    # Brought to [1/2, 1) by a power of two, which rounds nothing, so that no square overflows.
    most = math.frexp(torch.finfo(magnitudes.dtype).max)[1] - 2
    exponent = torch.frexp(magnitudes.amax(dim=1, keepdim=True)).exponent.clamp(-most, most)
    values = torch.ldexp(magnitudes, -exponent).sort(dim=1).values
    sums = F.pad(values.cumsum(dim=1, dtype=torch.float64), (1, 0))
    energy = values.double().square().sum(dim=1, keepdim=True)
    ranked = Ranked(values, sums, energy)
    low, high, best = _outer_range(ranked, bound)
    for _ in range(PASSES):
        low, high, best = _narrow(ranked, bound, low, high, best)
    return torch.ldexp(_best_breakpoint(ranked, bound, low, high), exponent)


def _ranks(ranked: Ranked, bound: int, scales: Tensor) -> Tensor:
    """Counts the magnitudes with a code below k = 1..M at each scale, with shape (rows, p, M)."""
    halves = torch.arange(bound, dtype=scales.dtype, device=scales.device) + 0.5
    thresholds = (scales[..., None] * halves).to(ranked.values.dtype)
    return torch.searchsorted(ranked.values, thresholds.flatten(1)).view(thresholds.shape)


def _moments(ranked: Ranked, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B of the codes described by ranks of shape (rows, p, M), with shape (rows, p).

    They are sums over k: one more for each magnitude that reaches code k, as q = sum_k [q >= k]
    and q^2 = sum_k (2 k - 1) [q >= k].
    """
    below = ranked.sums.gather(1, ranks.flatten(1)).view(ranks.shape)
    odd = 2 * torch.arange(ranks.shape[-1], device=ranks.device) + 1
    first = (ranked.sums[:, -1, None, None] - below).sum(dim=-1)
    second = ((ranked.values.shape[1] - ranks) * odd).sum(dim=-1).double()
    return first, second


def _outer_range(ranked: Ranked, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a range of scales that surely holds the best one, and the error of some scale.

    Above twice the largest magnitude all codes are zero. Below `low`, each magnitude beyond M low
    is cut off by at least its excess; so `low` is safe once the excesses alone make more than a
    known error, and until then it is halved. All results have shape (rows, 1).
    """
    top = ranked.values[:, -1:].double()
    first, second = _moments(ranked, _ranks(ranked, bound, top / bound))
    known = ranked.energy - first.square() / second
    low = top / (4 * bound)
    while True:
        excess = (ranked.values - bound * low).clamp_min(0)
        unsafe = excess.square().sum(dim=1, keepdim=True) < known
        if not unsafe.any():
            return low, 2 * top, known
        low = torch.where(unsafe, low / 2, low)


def _narrow(
    ranked: Ranked, bound: int, low: Tensor, high: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrinks a range of scales to the hull of its cells that may hold the best one.

    Returns:
        The new range and the least error known, each with shape (rows, 1).
    """
    # Cells of equal ratio rho^2; the scale at the middle of each is tried.
    rho = (high / low) ** (0.5 / POINTS)
    index = torch.arange(POINTS, dtype=torch.float64, device=low.device)
    scales = low * rho ** (2 * index + 1)  # (rows, POINTS)
    first, second = _moments(ranked, _ranks(ranked, bound, scales))
    error = ranked.energy - scales * (2 * first - scales * second)
    # The same codes at their own best scale; codes that are all zero keep the error |a|^2.
    reached = ranked.energy - first.square() / second.clamp_min(1)
    known = torch.minimum(known, reached.amin(dim=1, keepdim=True))
    norm, distance = ranked.energy.sqrt(), error.clamp_min(0).sqrt()
    least = torch.minimum(
        distance - (rho - 1) * (norm - distance),  # anywhere in the upper half of the cell
        distance - (1 - 1 / rho) * (norm + distance),  # anywhere in the lower half
    )
    alive = least <= known.clamp_min(0).sqrt() + 1e-7 * norm  # the square root of rounding
    start = alive.int().argmax(dim=1, keepdim=True)
    stop = POINTS - alive.flip(1).int().argmax(dim=1, keepdim=True)
    return low * rho ** (2 * start), low * rho ** (2 * stop), known


def _best_breakpoint(ranked: Ranked, bound: int, low: Tensor, high: Tensor) -> Tensor:
    """Visits all breakpoints from `high` down to `low`; returns the best scale per row."""
    ranks = _ranks(ranked, bound, torch.cat([low, high], dim=1))
    bottom, top = ranks.unbind(dim=1)  # (rows, M)
    first, second = _moments(ranked, ranks[:, 1:])
    # Slot by slot, the magnitudes whose code rises to k within the range: first those of k = 1.
    filled = (top - bottom).cumsum(dim=1)
    slots = torch.arange(int(filled[:, -1].max()), device=low.device)
    slots = slots.expand(len(low), -1).contiguous()
    used = slots < filled[:, -1:]  # rows with fewer breakpoints leave slots empty
    code = torch.searchsorted(filled, slots, right=True).clamp_max(bound - 1)  # k - 1
    place = top.gather(1, code) - filled.gather(1, code) + slots
    values = ranked.values.gather(1, place.clamp_max(ranked.values.shape[1] - 1)).double()
    breaks = torch.where(used, values / (code + 0.5), -math.inf)
    order = breaks.argsort(dim=1, descending=True)
    gains = torch.where(used, values, 0).gather(1, order).cumsum(dim=1)
    growth = torch.where(used, 2 * code + 1, 0).gather(1, order).cumsum(dim=1)
    first = torch.cat([first, first + gains], dim=1)
    second = torch.cat([second, second + growth], dim=1)
    winner = (first.square() / second.clamp_min(1)).argmax(dim=1, keepdim=True)
    return first.gather(1, winner) / second.gather(1, winner)
