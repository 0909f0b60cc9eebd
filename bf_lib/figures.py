"""Figures as calls: what draws them, from which saved tables, so that they can be drawn again.

A figure that is made by a function of saved tables records that call in its sidecar;
`python -m bf_lib.figures PRESET` (`make figures`) replays them without computing anything again.
"""

__all__ = ["Drawing", "main", "redraw"]

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Self

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bf_lib import artifacts
from bf_lib.artifacts import Origin
from bf_lib.paths import ROOT, display_path, figures_folder, runs_folder


@dataclass(frozen=True, slots=True)
class Drawing:
    """A call that draws a figure."""

    function: str  # "bf_lib.plots.module:name"
    tables: dict[str, str]  # argument -> "NN_notebook/stem"
    arguments: dict[str, object]  # the others, in JSON's types

    @classmethod
    def of(
        cls,
        draw: Callable[..., Figure],
        tables: Mapping[str, str],
        arguments: Mapping[str, object],
    ) -> Self:
        """Returns the call of a function of `bf_lib`, which is then found again by its name."""
        function = f"{draw.__module__}:{draw.__qualname__}"
        if not draw.__module__.startswith("bf_lib.") or not draw.__qualname__.isidentifier():
            raise ValueError(
                f"{function} cannot be found again by its name: pass a function of bf_lib, "
                "or draw the figure and pass that"
            )
        return cls(function, dict(tables), artifacts.plain(dict(arguments), function))

    def inputs(self, preset: str, root: Path = ROOT) -> dict[str, Path]:
        """Returns the files of the tables, by argument."""
        names = {argument: name.split("/") for argument, name in self.tables.items()}
        return {
            argument: runs_folder(preset, notebook, root) / f"{stem}.csv"
            for argument, (notebook, stem) in names.items()
        }

    def draw(self, preset: str, root: Path = ROOT) -> Figure:
        """Loads the tables and draws."""
        module, _, name = self.function.partition(":")
        function = getattr(import_module(module), name)
        tables = {
            argument: artifacts.load_table(path)
            for argument, path in self.inputs(preset, root).items()
        }
        return function(**tables, **self.arguments)


def redraw(sidecar: Path, root: Path = ROOT) -> bool:
    """Draws a figure again from its sidecar; returns False when that cannot be done.

    Arguments:
        sidecar: The JSON file beside the figure.
        root: The repository.
    """
    record = json.loads(sidecar.read_bytes())
    if record["drawing"] is None:
        return False
    origin = Origin(**{field.name: record[field.name] for field in fields(Origin)})
    drawing = Drawing(**record["drawing"])
    figure = drawing.draw(origin.preset, root)
    artifacts.save_figure(
        figure, sidecar.with_suffix(""), origin, record["caption"], asdict(drawing)
    )
    plt.close(figure)
    return True


def main(preset: str, root: Path = ROOT) -> int:
    """Draws all figures of a preset again, and says which it cannot; returns the exit status."""
    mpl.use("agg")
    plt.style.use("bf_lib.bf")
    sidecars = sorted(figures_folder(preset, root).glob("*.json"))
    if not sidecars:
        print(f"no figures: `make reproduce PRESET={preset}` makes them", file=sys.stderr)
        return 1
    for sidecar in sidecars:
        drawn = redraw(sidecar, root)
        kept = "" if drawn else "  (kept: shows images, which only its notebook can make)"
        print(f"{display_path(sidecar.with_suffix('.png'), root)}{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
