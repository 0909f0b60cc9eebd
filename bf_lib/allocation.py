"""From sensitivities to levels: the paper's rule, and the exact optimum under a budget.

*The rule* (BitsFusion, §3.3 and Alg. 1) looks at each layer by itself: with the error M_{i,b} of
layer i at b bits and its N_i weights, the score is

    S_{i,b} = M_{i,b} N_i^(-eta),

and the layer gets the fewest bits of which the score is below a threshold S_o, or one bit more
than the most that were tried. Layers with the largest CLIP drop get up to three bits more. The
paper does not give S_o; here it is solved for a budget.

*The optimum* takes the errors as additive and minimises their sum over all ways to spend the
budget: a multiple-choice knapsack problem, solved by HiGHS to a proven gap.

Errors and costs are tables with a row for each layer, by name, and a column for each choice, in
rising order of cost: the paper's bits, or the levels of a grid.
"""

__all__ = [
    "Allocation",
    "ImpossibleBudget",
    "clip_bonus",
    "cost_table",
    "extended",
    "optimum",
    "paper_rule",
    "random_choice",
    "within_budget",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from bf_lib.grids import bits_of_levels
from bf_lib.layers import Layer
from bf_lib.output import without_output
from bf_lib.packing import packed_bytes

BONUS_QUANTILES = (0.90, 0.95, 0.98)  # Alg. 1: a bit more above each of these
ROOM = 1e-9  # of the budget: how far HiGHS may step over it, as it is scaled here


class ImpossibleBudget(ValueError):
    """No choice of levels is within the budget; says what the smallest size is."""


def cost_table(
    layers: Sequence[Layer], levels: Sequence[int], stored: bool = True
) -> pd.DataFrame:
    """Returns what the codes of each layer cost at each number of levels, in bytes.

    Arguments:
        layers: The layers.
        levels: The choices, rising.
        stored: Whether as they are packed, or else as the paper counts them, log2(levels) bits
            for each weight.
    """

    def cost(layer: Layer, count: int) -> float:
        if stored:
            return packed_bytes(count, layer.params)
        return bits_of_levels(count) * layer.params / 8

    rows = {layer.name: [cost(layer, count) for count in levels] for layer in layers}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(levels))


def extended(errors: pd.DataFrame, weight_errors: pd.DataFrame) -> pd.DataFrame:
    """Returns errors at more levels than were measured, in proportion to those of the weights.

    Small changes of the weights change images in proportion, so the squared error of images falls
    as that of the weights does. The most levels that were measured are the base.

    Arguments:
        errors: What was measured, with columns of levels.
        weight_errors: Relative squared errors of the weights, with columns of these and more.
    """
    base = errors.columns[-1]
    more = [count for count in weight_errors.columns if count > base]
    shares = weight_errors.loc[errors.index, more].div(
        weight_errors.loc[errors.index, base], axis=0
    )
    return errors.join(shares.mul(errors[base], axis=0))


# ---- the paper's rule


def paper_rule(
    errors: pd.DataFrame, params: pd.Series, threshold: float, eta: float = 0.3
) -> pd.Series:
    """Returns the bits of each layer: the fewest whose score is below the threshold (Alg. 1).

    The smallest passing bit-width wins even where the score of a larger one is above, as in
    Alg. 1, whose loop runs from 3 down to 1.

    Arguments:
        errors: M_{i,b}, with rising whole bits as columns, 1, 2 and 3 in the paper.
        params: N_i, the weights of each layer.
        threshold: S_o.
        eta: How much larger layers are favoured; 0.3 in the paper.
    """
    passing = scores(errors, params, eta).lt(threshold)
    most = max(errors.columns) + 1  # where none passes: 4 in the paper
    return passing.idxmax(axis=1).where(passing.any(axis=1), most).astype(int)


def scores(errors: pd.DataFrame, params: pd.Series, eta: float) -> pd.DataFrame:
    """Returns S_{i,b} = M_{i,b} N_i^(-eta)."""
    return errors.mul(params.loc[errors.index] ** -eta, axis=0)


def clip_bonus(drops: pd.Series) -> pd.Series:
    """Returns how many bits more each layer gets for its CLIP drop at 3 bits (Alg. 1).

    One above the 90th percentile over layers, another above the 95th, another above the 98th.
    """
    return sum((drops > drops.quantile(q)).astype(int) for q in BONUS_QUANTILES)


def within_budget(
    errors: pd.DataFrame,
    params: pd.Series,
    cost: Callable[[pd.Series], float],
    budget: float,
    eta: float = 0.3,
    bonus: pd.Series | int = 0,
    fixed: float = 0,
) -> pd.Series:
    """Returns the bits of the paper's rule with the smallest threshold that the budget allows.

    Arguments:
        errors: M_{i,b}, with bits as columns.
        params: N_i.
        cost: Returns what bits cost, which must not fall where bits rise.
        budget: The most that they may cost.
        eta: As in `paper_rule`.
        bonus: Bits that layers get beside, as of `clip_bonus`.
        fixed: What of the budget is spent already.

    Raises:
        ImpossibleBudget: If even an infinite threshold costs more.
    """
    found = scores(errors, params, eta).to_numpy()
    # Between two scores the threshold decides nothing, and with it bits only fall.
    steps = [*np.unique(found), np.inf]

    def bits(place: int) -> pd.Series:
        return paper_rule(errors, params, steps[place], eta) + bonus

    low, high = 0, len(steps) - 1
    if fixed + cost(bits(high)) > budget:
        raise ImpossibleBudget(_impossible(budget, fixed + cost(bits(high))))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fixed + cost(bits(middle)) <= budget else (middle + 1, high)
    return bits(high)


# ---- the optimum


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """A choice for each layer, and how good it is known to be."""

    choice: pd.Series  # by name of layer: a column of the tables
    error: float  # the sum of predicted errors
    cost: float
    bound: float  # no choice within the budget has a smaller sum

    @property
    def gap(self) -> float:
        """How far the sum may be above the smallest one, relative to it; 0 is proven optimal."""
        return 0.0 if self.error <= self.bound else (self.error - self.bound) / abs(self.error)


def optimum(
    errors: pd.DataFrame,
    costs: pd.DataFrame,
    budget: float,
    apart_from: Sequence[pd.Series] = (),
    differing: int = 1,
    gap: float = 1e-6,
    fixed: float = 0,
) -> Allocation:
    """Returns the choice with the smallest sum of errors within a budget.

    Arguments:
        errors: The error of each layer at each choice; of any sign.
        costs: What it costs, with the same rows and columns.
        budget: The most that the choice may cost in all.
        apart_from: Choices that the result must differ from.
        differing: In how many layers at least.
        gap: The search ends when the sum is proven to be so near the smallest one.
        fixed: What of the budget is spent already.

    Raises:
        ImpossibleBudget: If no choice is within the budget.
    """
    costs = costs.loc[errors.index, errors.columns]
    smallest = float(costs.min(axis=1).sum())
    if fixed + smallest > budget:
        raise ImpossibleBudget(_impossible(budget, fixed + smallest))
    budget -= fixed
    if not np.isfinite(errors.to_numpy()).all():
        raise ValueError(f"errors of {errors.index[~np.isfinite(errors).all(axis=1)][0]} are NaN")
    rows, columns = errors.shape
    one_each = kron(eye_array(rows), np.ones((1, columns)))
    limits = [LinearConstraint(csr_array(one_each), 1, 1)]
    for other in apart_from:
        same = errors.columns.to_numpy()[None, :] == other.loc[errors.index].to_numpy()[:, None]
        limits.append(LinearConstraint(same.ravel().astype(float), -np.inf, rows - differing))
    # HiGHS also works to absolute tolerances of 1e-6 and less, so that the budget becomes 1000,
    # and the largest error as well: the sum of the chosen ones is often far below it.
    unit = budget * ROOM / 1e-6
    size = (np.abs(errors.to_numpy()).max() or 1.0) / 1000
    allowed, bound = budget, np.inf
    while True:
        price = LinearConstraint(costs.to_numpy().ravel() / unit, -np.inf, allowed / unit)
        with without_output():
            found = milp(
                errors.to_numpy().ravel() / size,
                integrality=np.ones(rows * columns),
                bounds=Bounds(0, 1),
                constraints=[*limits, price],
                # What is found in the presolved problem may be a little out of bounds in this one.
                options={"mip_rel_gap": gap, "presolve": False},
            )
        if found.x is None:
            raise ImpossibleBudget(f"no such choice costs {budget:,.0f} or less: {found.message}")
        bound = min(bound, found.mip_dual_bound * size)  # that of the whole budget is the first
        places = found.x.reshape(rows, columns).argmax(axis=1)
        cost = float(np.take_along_axis(costs.to_numpy(), places[:, None], axis=1).sum())
        if cost <= budget:
            break
        allowed -= max(cost - budget, ROOM * budget)  # stepped over within its tolerance
    choice = pd.Series(errors.columns.to_numpy()[places], index=errors.index)
    total = float(np.take_along_axis(errors.to_numpy(), places[:, None], axis=1).sum())
    return Allocation(choice, total, cost, min(total, bound))


def random_choice(
    costs: pd.DataFrame, budget: float, rng: np.random.Generator, fixed: float = 0
) -> pd.Series:
    """Returns a random choice that fills a budget: layers rise one by one while there is room.

    Arguments:
        costs: What each layer costs at each choice, rising along the columns.
        budget: The most that it may cost in all.
        rng: The source of randomness.
        fixed: What of the budget is spent already.

    Raises:
        ImpossibleBudget: If the first choices cost more.
    """
    table = costs.to_numpy()
    places = np.zeros(len(table), dtype=int)
    left = budget - fixed - table[:, 0].sum()
    if left < 0:
        raise ImpossibleBudget(_impossible(budget, budget - left))
    rises = np.diff(table, axis=1)
    open_rows = list(range(len(table)))
    while open_rows:
        row = open_rows[rng.integers(len(open_rows))]
        if places[row] < rises.shape[1] and rises[row, places[row]] <= left:
            left -= rises[row, places[row]]
            places[row] += 1
        else:
            open_rows.remove(row)
    return pd.Series(costs.columns.to_numpy()[places], index=costs.index)


def _impossible(budget: float, smallest: float) -> str:
    return f"a budget of {budget:,.0f} bytes is too small: the least possible is {smallest:,.0f}"
