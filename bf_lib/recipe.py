"""Recipes: how many levels each layer of a UNet gets, by its name, and how that was found.

Names are all that a recipe says of layers, so one made for SD-v1.5 fits each of its fine-tunes,
and `mini`, which has layers of the same names. The paper's own recipe is in App. H.
"""

__all__ = ["Recipe", "RecipeError", "published_recipe"]

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import nn

from bf_lib.atomic import write_atomically
from bf_lib.grids import bits_of_levels, levels_of_bits
from bf_lib.layers import ENDS, TIMED, all_layers, published_bits

FORMAT = "bitsfusion recipe 1"


class RecipeError(ValueError):
    """A recipe is no recipe, or not one for this UNet; all that is wrong is listed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The levels of layers by their names, and what they come from.

    A recipe names each quantizable layer (`list_layers`), and if they are to be quantized as well,
    the first and the last convolution. "b bits" of the paper are 2^b + 1 levels.
    """

    levels: Mapping[str, int]
    made: Mapping[str, Any] = field(default_factory=dict)  # provenance: anything JSON can say

    def __post_init__(self) -> None:
        _refuse(_wrong_levels(self.levels.items()))
        object.__setattr__(self, "levels", MappingProxyType(dict(self.levels)))
        object.__setattr__(self, "made", MappingProxyType(dict(self.made)))

    def __reduce__(self) -> tuple:
        """Makes copies and pickles, which read-only views refuse."""
        return (Recipe, (dict(self.levels), dict(self.made)))

    @classmethod
    def of_bits(cls, bits: Mapping[str, int], made: Mapping[str, Any] | None = None) -> Self:
        """Returns the recipe of the paper's bit-widths, 2^b + 1 levels for "b bits"."""
        return cls({name: levels_of_bits(b) for name, b in bits.items()}, made or {})

    @classmethod
    def load(cls, path: str | Path, unet: nn.Module | None = None) -> Self:
        """Reads a recipe, and where a UNet is given, checks it against its layers.

        Raises:
            RecipeError: If the file is not a recipe, names a layer twice or gives one levels that
                no balanced grid has; or if it lacks layers of the UNet or names others. One error
                lists all of these.
        """
        try:
            # Python's reader keeps the last of two entries with one name; pairs keep both.
            pairs = json.loads(Path(path).read_text(), object_pairs_hook=list)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not JSON: {error}") from error
        top = dict(pairs) if _is_object(pairs) else {}
        entries = top.get("levels")
        if top.get("format") != FORMAT or not _is_object(entries):
            raise RecipeError(f"{path} is not a recipe: it must have format {FORMAT!r} and levels")
        names = [name for name, _ in entries]
        doubled = [
            f"{n!r} is there twice" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        unfit = _unfit(names, unet) if unet is not None else []
        _refuse([*doubled, *_wrong_levels(entries), *unfit], f"{path}: ")
        made = _as_dict(top["made"]) if _is_object(top.get("made")) else {}
        return cls(dict(entries), made)

    def save(self, path: str | Path) -> None:
        """Writes the recipe as JSON, completely or not at all."""
        write_atomically(Path(path), (json.dumps(self.record(), indent=1) + "\n").encode())

    def record(self) -> dict[str, Any]:
        """Returns what `save` writes."""
        return {"format": FORMAT, "levels": dict(self.levels), "made": dict(self.made)}

    def check(self, unet: nn.Module) -> None:
        """Makes sure that the recipe fits a UNet, which may be on the meta device.

        Raises:
            RecipeError: If it lacks layers of the UNet or names others; it lists them all.
        """
        _refuse(_unfit(list(self.levels), unet))

    def bits(self) -> dict[str, float]:
        """Returns what a weight of each layer weighs, log2(levels)."""
        return {name: bits_of_levels(count) for name, count in self.levels.items()}


def published_recipe() -> Recipe:
    """Returns the paper's recipe for SD-v1.5: 256 layers, and the first and last at 8 bits."""
    table = published_bits()
    bits = {name: int(b) for name, b in zip(table.name, table.bits, strict=True)}
    return Recipe.of_bits(bits, {"source": "BitsFusion (arXiv 2406.04333v2), App. H"})


# ---- what can be wrong


def _wrong_levels(entries: Iterable[tuple[str, Any]]) -> list[str]:
    return [
        f"{name!r} has {count!r} levels, not an odd whole number of at least 3"
        for name, count in entries
        if type(count) is not int or count < 3 or count % 2 == 0
    ]


def _unfit(names: list[str], unet: nn.Module) -> list[str]:
    """Says which names the UNet does not have, and which of its layers have no name."""
    layers = all_layers(unet)
    needed = [layer.name for layer in layers if layer.excluded is None]
    allowed = {*needed, *(layer.name for layer in layers if layer.excluded in ENDS)}
    wrong = []
    for name in sorted(set(names) - allowed):
        if any(layer.name == name for layer in layers):
            wrong.append(f"{name!r} is not quantized: {TIMED}")
        else:
            close = difflib.get_close_matches(name, allowed, n=1)
            wrong.append(f"{name!r} is unknown{f', perhaps {close[0]!r}' if close else ''}")
    return wrong + [f"{name!r} is missing" for name in needed if name not in set(names)]


def _refuse(problems: list[str], where: str = "") -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RecipeError("\n  ".join([f"{where}the recipe has {count}:", *problems]))


# ---- JSON as pairs


def _is_object(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, tuple) and len(v) == 2 for v in value)


def _as_dict(value: object) -> object:
    """Makes dictionaries of lists of pairs, all the way down."""
    if isinstance(value, list) and value and _is_object(value):
        return {name: _as_dict(v) for name, v in value}
    return [_as_dict(v) for v in value] if isinstance(value, list) else value
