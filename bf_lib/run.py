"""What a notebook starts with: the run, which knows its sizes and keeps its results.

A notebook reads, in short:

    run = Run.start("03_sensitivity", preset, seed)
    layers = run.load_table("01_unet_anatomy", "layers")
    run.save_table(rows, "rows")
    run.save_figure(plots.bars, "bars", caption="...", tables={"rows": "03_sensitivity/rows"})
    run.check("every candidate has a row", len(rows), expected=768)
    run.claim("share of convolutions", share, low=0.6, high=0.7, expected=0.685, source="Fig. 2")
    run.finish()
"""

__all__ = ["Run"]

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import matplotlib.pyplot as plt
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from torch import Tensor

from bf_lib import artifacts, claims, provenance
from bf_lib.artifacts import Origin
from bf_lib.claims import Claim, ClaimFailed, Value
from bf_lib.figures import Drawing
from bf_lib.models import load_pipeline
from bf_lib.paths import ROOT, display_path, figures_folder, runs_folder
from bf_lib.processes import make_deterministic
from bf_lib.study import Study


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of one notebook."""

    notebook: str
    study: Study
    seed: int
    device: torch.device
    generator: torch.Generator  # on the CPU, so that numbers are alike on every device
    parameters: dict[str, object] = field(default_factory=dict)  # that differ from the preset's
    root: Path = ROOT
    inputs: dict[str, str] = field(default_factory=dict)  # file -> digest, as they are loaded
    written: dict[str, str] = field(default_factory=dict)  # stem -> file, in order
    claimed: list[Claim] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls,
        notebook: str,
        preset: str,
        seed: int,
        *,
        root: Path = ROOT,
        **overrides: object,
    ) -> Self:
        """Sets style, determinism and threads, shows what runs in a line, and returns the run.

        Arguments:
            notebook: The notebook's name, which everything it writes lies under.
            preset: The preset of the study.
            seed: The seed of `generator`.
            root: Where to write; the repository.
            overrides: Fields of the study that differ from the preset's; None is not given.
        """
        study = Study.of(preset, **overrides)
        make_deterministic(study.threads)
        pd.set_option("display.max_colwidth", None)  # a layer's name ends in what tells it apart
        plt.style.use("bf_lib.bf")
        run = cls(
            notebook=notebook,
            study=study,
            seed=seed,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            generator=torch.Generator("cpu").manual_seed(seed),
            parameters={name: value for name, value in overrides.items() if value is not None},
            root=root,
        )
        display(Markdown(run.banner()))
        return run

    def banner(self) -> str:
        """Returns the line that keeps a toy's number from being read as the paper's.

        The commit is shown only live: a rendered copy would differ at each, and is always one
        behind. `render.json` holds it.
        """
        parts = [
            f"preset **{self.study.preset}**",
            f"model `{self.study.model}`",
            f"device {self.device}",
            f"{self.study.threads} thread(s) per process",
            f"seed {self.seed}",
            *(f"{name} = {value}" for name, value in self.parameters.items()),
        ]
        if not os.environ.get("BF_HEADLESS"):
            code = provenance.code_version(self.root)
            parts.append(f"commit {code['commit']}{' with changes' if code['dirty'] else ''}")
        return " · ".join(parts)

    def pipeline(self) -> StableDiffusionPipeline:
        """Loads the study's model to the run's device, in the study's precision."""
        dtype = getattr(torch, self.study.dtype)
        return load_pipeline(self.study.model, device=self.device, dtype=dtype)

    # ---- results

    @property
    def folder(self) -> Path:
        """The folder of this notebook's tables, records and tensors."""
        return runs_folder(self.study.preset, self.notebook, self.root)

    def work(self, notebook: str | None = None) -> Path:
        """Returns the folder of what is too large to keep: checkpoints, packed UNets, examples.

        Arguments:
            notebook: Another notebook, whose folder it is.
        """
        return self.root / "build" / self.study.preset / "work" / (notebook or self.notebook)

    def save_table(self, frame: pd.DataFrame, stem: str) -> None:
        """Writes a table of this notebook."""
        artifacts.save_table(frame, self._new(stem, "csv"), self._origin())

    def save_json(self, record: object, stem: str) -> None:
        """Writes a record of this notebook."""
        artifacts.save_json(record, self._new(stem, "json"), self._origin())

    def save_tensors(self, tensors: dict[str, Tensor], stem: str) -> None:
        """Writes named tensors of this notebook."""
        artifacts.save_tensors(tensors, self._new(stem, "safetensors"), self._origin())

    def load_table(self, notebook: str, stem: str) -> pd.DataFrame:
        """Reads a table of this or an earlier notebook."""
        return artifacts.load_table(self._input(notebook, f"{stem}.csv"))

    def load_json(self, notebook: str, stem: str) -> object:
        """Reads a record of this or an earlier notebook."""
        return artifacts.load_json(self._input(notebook, f"{stem}.json"))

    def load_tensors(self, notebook: str, stem: str) -> dict[str, Tensor]:
        """Reads named tensors of this or an earlier notebook."""
        return artifacts.load_tensors(self._input(notebook, f"{stem}.safetensors"))

    def save_figure(
        self,
        drawn: Figure | Callable[..., Figure],
        stem: str,
        *,
        caption: str,
        tables: Mapping[str, str] | None = None,
        **arguments: object,
    ) -> None:
        """Writes a figure and shows it with its caption.

        Arguments:
            drawn: A function of `bf_lib.plots`, or a figure. A function is called here, and again
                by `make figures`; a figure cannot be drawn again without its notebook.
            stem: The figure's name within this notebook.
            caption: What a reader should see in it.
            tables: Saved tables to pass to the function: argument -> "NN_notebook/stem".
            arguments: Other arguments of the function, in JSON's types.
        """
        folder = figures_folder(self.study.preset, self.root)
        path = folder / f"{self.notebook}-{stem}"
        assert path.parent == folder, f"{stem!r} would lie outside of {folder}"
        origin, call = self._origin(), None
        if isinstance(drawn, Figure):
            if tables or arguments:
                raise ValueError(f"{stem}: a drawn figure takes no tables or arguments")
            figure = drawn
        else:
            drawing = Drawing.of(drawn, tables or {}, arguments)
            figure, call = drawing.draw(self.study.preset, self.root), asdict(drawing)
            origin = self._origin(list(drawing.inputs(self.study.preset, self.root).values()))
        artifacts.save_figure(figure, path, origin, caption, call)
        self._note(f"figure {stem}", display_path(path.with_suffix(".png"), self.root))
        plt.close(figure)  # or the notebook would show it a second time at the end of the cell
        display(figure, metadata={"image/png": {"alt": caption}})
        display(Markdown(f"*{caption}*"))

    # ---- claims

    def check(self, name: str, value: Value, **bounds: object) -> None:
        """Records something that must hold; `finish` raises when it does not.

        Arguments:
            name: What must hold.
            value: What this run got.
            bounds: `low`, `high`, `expected`, `interval`, `source` and `presets` (by default the
                check holds in every preset), as in `claims.make_claim`.
        """
        self._claim(name, value, "check", {"presets": (self.study.preset,)} | bounds)

    def claim(
        self,
        name: str,
        value: Value,
        *,
        presets: Sequence[str] = ("mini",),
        aim: bool = False,
        **bounds: object,
    ) -> None:
        """Records a comparison with the paper, or an aim, which may come out either way.

        Arguments:
            name: What is claimed.
            value: What this run got; None when it was not attempted.
            presets: The presets that the claim is about.
            aim: Whether it is an aim of this study, of which the paper says nothing.
            bounds: `low`, `high`, `expected`, `interval` and `source`, as in `claims.make_claim`.
        """
        self._claim(name, value, "aim" if aim else "comparison", {"presets": presets} | bounds)

    def finish(self) -> pd.DataFrame | None:
        """Writes claims and the record of this run, and returns the claims to show, if any.

        Raises `ClaimFailed` when a check does not hold, after everything is written.
        """
        record = claims.record(self.claimed)
        self.save_json(record, "claims")
        artifacts.write_json(
            {
                "artifacts": sorted(self.written.values()),
                "code": provenance.code_version(self.root),
                "bf_lib": provenance.library_digest(),
                "machine": provenance.machine(),
                "versions": provenance.versions(),
                "wall_s": round(time.monotonic() - self.started, 1),
            },
            self.folder / "render.json",
        )
        if failed := claims.failures(self.claimed):
            raise ClaimFailed(failed)
        return claims.readable(claims.table(record)) if record else None

    # ---- bookkeeping

    def _claim(self, name: str, value: Value, kind: str, bounds: dict) -> None:
        if any(claim.name == name for claim in self.claimed):
            raise ValueError(f"claim {name!r} is made twice")
        self.claimed.append(
            claims.make_claim(name, value, kind=kind, preset=self.study.preset, **bounds)
        )

    def _new(self, stem: str, suffix: str) -> Path:
        path = self.folder / f"{stem}.{suffix}"
        assert path.parent == self.folder, f"{stem!r} would lie outside of {self.folder}"
        self._note(stem, display_path(path, self.root))
        return path

    def _note(self, stem: str, shown: str) -> None:
        # A table and a record of one name would share a sidecar.
        if self.written.setdefault(stem, shown) != shown:
            raise ValueError(f"{shown}: this notebook wrote {self.written[stem]} already")

    def _input(self, notebook: str, name: str) -> Path:
        path = runs_folder(self.study.preset, notebook, self.root) / name
        self.inputs |= self._digests([path])
        return path

    def _digests(self, paths: list[Path]) -> dict[str, str]:
        return {
            f"{path.parent.name}/{path.name}": provenance.sha256(path.read_bytes())
            for path in paths
            if path.exists()  # else loading says which notebook to run
        }

    def _origin(self, inputs: list[Path] | None = None) -> Origin:
        return Origin(
            made_by=self.notebook,
            preset=self.study.preset,
            seed=self.seed,
            parameters=self.parameters,
            study=asdict(self.study),
            inputs=self.inputs if inputs is None else self._digests(inputs),
        )
