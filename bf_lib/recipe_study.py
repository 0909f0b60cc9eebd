"""The recipes that the study compares, each for a size in bytes (BitsFusion, §3.3 and Table 5)."""

__all__ = [
    "LEVELS",
    "Choices",
    "agreement_table",
    "ascending",
    "at_random",
    "by_optimum",
    "by_rule",
    "error_table",
    "mean_bits",
    "uniform",
    "weight_error_table",
    "weighted_pair",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pandas as pd
from torch import nn

from bf_lib.allocation import (
    Allocation,
    clip_bonus,
    cost_table,
    optimum,
    random_choice,
    within_budget,
)
from bf_lib.grids import (
    alternating_scale,
    fake_quantize,
    levels_of_bits,
    nominal_bits,
    relative_mse,
)
from bf_lib.layers import Layer, get_layer
from bf_lib.recipe import Recipe
from bf_lib.sensitivity.correlation import rank_agreement
from bf_lib.sizes import size_report

LEVELS = tuple(levels_of_bits(b) for b in range(1, 8))  # 3 to 129: Alg. 1 ends at 7 bits
ROOM = 8  # bytes of the header for each layer


def weight_error_table(
    unet: nn.Module, layers: Sequence[Layer], levels: Sequence[int] = LEVELS
) -> pd.DataFrame:
    """Returns the relative squared error of each layer's weights at each number of levels."""

    def errors(layer: Layer) -> list[float]:
        weight = get_layer(unet, layer.name).weight.detach()
        rounded = (fake_quantize(weight, alternating_scale(weight, n), n) for n in levels)
        return [float(relative_mse(weight, approximation)) for approximation in rounded]

    rows = {layer.name: errors(layer) for layer in layers}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(levels))


def error_table(sensitivity: pd.DataFrame, metric: str, layers: Sequence[Layer]) -> pd.DataFrame:
    """Returns one metric of the sweep, with a row for each layer and a column for each level.

    Arguments:
        sensitivity: The table of the sweep, or of an estimate.
        metric: A column of it.
        layers: The layers to have a row; those that were not swept count as harmless.
    """
    wide = sensitivity.pivot(index="layer", columns="levels", values=metric)
    names = [layer.name for layer in layers]
    return wide.reindex(names, fill_value=0.0).rename_axis(index=None, columns=None)


def weighted_pair(mse: pd.DataFrame, drops: pd.DataFrame, weight: float) -> pd.DataFrame:
    """Returns (1 - weight) times the image errors plus weight times the CLIP drops.

    Both are divided by their mean first, since they have different units. A negative drop, an
    image that fits its prompt better by chance, counts as none: a sum of these would promise that
    rounding makes images better.
    """
    kept = drops.clip(lower=0)
    first, second = (table / (table.to_numpy().mean() or 1) for table in (mse, kept))
    return (1 - weight) * first + weight * second


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What there is to choose from, and what is known of it: tables of layers by levels."""

    errors: pd.DataFrame  # predicted damage
    costs: pd.DataFrame  # bytes of codes
    params: pd.Series  # weights of each layer
    fixed: int  # bytes of everything else in the file, at most

    @classmethod
    def of(
        cls,
        unet: nn.Module,
        layers: Sequence[Layer],
        errors: pd.DataFrame,
        timesteps: int,
        stored: bool = True,
    ) -> Self:
        """Returns the choices for a UNet.

        Arguments:
            unet: The original UNet.
            layers: Its layers.
            errors: Predicted damage, with columns of `LEVELS`.
            timesteps: How many time-steps' features are stored.
            stored: Whether sizes are those of files, or of what the paper's average counts.
        """
        most = Recipe({layer.name: LEVELS[-1] for layer in layers})
        parts = size_report(unet, most, timesteps).parts
        rest = parts[parts.kind != "codes"]
        if stored:
            # The header says more of some recipes than of others, by some letters for a layer.
            fixed = int(rest.stored_bytes.sum()) + ROOM * len(layers)
        else:
            fixed = int((rest.ideal_bits * rest["count"])[rest.counted].sum() / 8)
        return cls(
            errors=errors,
            costs=cost_table(layers, LEVELS, stored),
            params=pd.Series({layer.name: layer.params for layer in layers}),
            fixed=fixed,
        )

    def up_to(self, levels: int) -> Self:
        """Returns the choices without those of more levels."""
        kept = [count for count in self.errors.columns if count <= levels]
        return replace(self, errors=self.errors[kept], costs=self.costs[kept])

    def predicted(self, recipe: Recipe) -> float:
        """Returns the sum of the errors of single layers."""
        return float(sum(self.errors.loc[name, count] for name, count in recipe.levels.items()))

    def cost(self, bits: pd.Series) -> float:
        """Returns the bytes of codes of the paper's bits."""
        return float(sum(self.costs.loc[name, levels_of_bits(b)] for name, b in bits.items()))


def uniform(choices: Choices, levels: int) -> Recipe:
    """Returns the recipe that gives all layers the same levels."""
    return Recipe(dict.fromkeys(choices.errors.index, levels), {"rule": "uniform"})


def by_rule(
    choices: Choices, size: int, eta: float = 0.3, drops: pd.Series | None = None
) -> Recipe:
    """Returns the recipe of the paper's rule (Alg. 1) for a file of a size.

    Arguments:
        choices: The layers, and M_{i,b}, of which only 1, 2 and 3 bits are looked at.
        size: The most bytes of the file.
        eta: Of S = M N^-eta.
        drops: The CLIP drop at 3 bits, if layers are to get bits for it.

    Raises:
        ImpossibleBudget: If the rule has no recipe so small.
    """
    errors = choices.errors.iloc[:, :3]
    errors = errors.set_axis([nominal_bits(levels) for levels in errors.columns], axis=1)
    bonus = 0 if drops is None else clip_bonus(drops.loc[errors.index])
    bits = within_budget(errors, choices.params, choices.cost, size, eta, bonus, choices.fixed)
    made = {"rule": "paper", "eta": eta, "refined": drops is not None, "bytes": size}
    return Recipe.of_bits({name: int(b) for name, b in bits.items()}, made)


def by_optimum(
    choices: Choices, size: int, apart_from: Sequence[Recipe] = (), differing: int = 1
) -> tuple[Recipe, Allocation]:
    """Returns the recipe with the least sum of errors for a file of a size, and its proof.

    Arguments:
        choices: The layers, their errors and costs.
        size: The most bytes of the file.
        apart_from: Recipes that it must differ from.
        differing: In how many layers at least.

    Raises:
        ImpossibleBudget: If there is no recipe so small.
    """
    others = [pd.Series(dict(recipe.levels)) for recipe in apart_from]
    found = optimum(choices.errors, choices.costs, size, others, differing, fixed=choices.fixed)
    levels = {name: int(count) for name, count in found.choice.items()}
    return Recipe(levels, {"rule": "optimum", "bytes": size, "gap": float(found.gap)}), found


def at_random(choices: Choices, size: int, count: int, seed: int) -> list[Recipe]:
    """Returns random recipes for a file of a size, each from a seed of its own."""
    drawn = [
        random_choice(choices.costs, size, np.random.default_rng((seed, n)), choices.fixed)
        for n in range(count)
    ]
    return [
        Recipe({name: int(v) for name, v in chosen.items()}, {"rule": "random", "bytes": size})
        for chosen in drawn
    ]


def ascending(choices: Choices, levels: int, counts: Sequence[int]) -> list[Recipe]:
    """Returns what quantizes the least sensitive layers only, so many of them in each.

    These are no recipes for a UNet, which must name every layer, but trials of a part of it.
    """
    order = choices.errors[levels].sort_values().index
    return [Recipe(dict.fromkeys(order[:count], levels)) for count in counts]


# ---- recipes beside each other


def mean_bits(layers: Sequence[Layer], recipes: Mapping[str, Recipe], over: str) -> pd.DataFrame:
    """Returns the mean of the paper's bits over the layers of each role, or of each block.

    Arguments:
        layers: Layers that all recipes name.
        recipes: By what their columns are to be called.
        over: "role", "block", or "name" for the layers themselves.

    Returns:
        The column `over`, and one for each recipe.
    """
    table = pd.DataFrame({over: [getattr(layer, over) for layer in layers]})
    for name, recipe in recipes.items():
        table[name] = [nominal_bits(recipe.levels[layer.name]) for layer in layers]
    return table.groupby(over, sort=False).mean().reset_index()


def agreement_table(
    layers: Sequence[Layer], recipes: Mapping[str, Recipe], reference: str
) -> pd.DataFrame:
    """Correlates the bits of recipes with those of one of them, by rank.

    Returns:
        Columns recipe, over ("name" for single layers, "role" or "block" for their means), count
        (of layers, roles or blocks), spearman, low and high (95 %, over these).
    """
    records = []
    for name in recipes:
        for over in ("name", "role", "block") if name != reference else ():
            table = mean_bits(layers, {n: recipes[n] for n in (reference, name)}, over)
            found = rank_agreement(table[reference], table[name])
            records.append({"recipe": name, "over": over, "count": len(table)} | found)
    return pd.DataFrame(records)
