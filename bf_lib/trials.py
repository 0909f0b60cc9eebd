"""Trials: whole recipes, drawn and compared with full precision, before any training.

Errors of single layers do not simply add up, so what a recipe does to images is measured. A trial
quantizes all layers that it names at once, with the alternating scale (BitsFusion, §4.1), and
draws the same prompts from the same seeds as the full-precision model.
"""

__all__ = [
    "Trial",
    "Trials",
    "all_quantized",
    "difference",
    "in_words",
    "score_intervals",
    "trial_table",
]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.evaluation import challenges, passes
from bf_lib.grids import alternating_scale, fake_quantize
from bf_lib.judges import load_scene_judge, read_scenes
from bf_lib.mini import to_float
from bf_lib.models import MODELS
from bf_lib.sensitivity.correlation import interval
from bf_lib.sensitivity.sweep import Bench as ImageBench
from bf_lib.sensitivity.sweep import Sweep

Scales = dict[tuple[str, int], Tensor]  # by layer and levels


@dataclass(frozen=True, slots=True)
class Trial:
    """One of the recipes of `Trials`, by its name, or full precision."""

    name: str

    @property
    def label(self) -> tuple[str, str]:
        """What to call its work."""
        return "recipe", self.name


@dataclass(frozen=True)
class Trials:
    """All that the rows of trials depend on: a job for `bf_lib.jobs`."""

    sweep: Sweep  # its model, prompts, seeds, sampler and metrics
    recipes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # name -> layer -> levels
    judged: tuple[int, int] | None = None  # challenges of each task and their seed; the prompts

    def __post_init__(self) -> None:
        names = [name for name, _ in self.recipes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"trials must have names of their own: {twice}")
        if self.judged is not None:
            asked = tuple(c.prompt for c in challenges(*self.judged))
            if asked != self.sweep.prompts:
                raise ValueError("images are judged by the challenges that are their prompts")

    @property
    def threads(self) -> int:
        return self.sweep.threads

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model whose layers are quantized."""
        return self.sweep.load(device)

    def judges(self) -> list[nn.Module]:
        """Loads what images are judged by."""
        return [*self.sweep.judges(), *([load_scene_judge(MODELS["mini"])] if self.judged else [])]

    def tasks(self, unet: nn.Module) -> list[Trial]:
        """Lists full precision, and then the recipes."""
        return [Trial(FULL), *(Trial(name) for name, _ in self.recipes)]

    def bench(self, pipe: StableDiffusionPipeline) -> "Bench":
        """Returns what tries recipes, with the images of full precision drawn."""
        return Bench(self, pipe)


FULL = "full precision"


class Bench:
    """A loaded model and what its images are compared and judged by."""

    def __init__(
        self, trials: Trials, pipe: StableDiffusionPipeline, reference: Tensor | None = None
    ) -> None:
        self.recipes = {name: dict(levels) for name, levels in trials.recipes} | {FULL: {}}
        self.scales: Scales = {}
        self.images = ImageBench(trials.sweep, pipe, reference)
        self.asked = challenges(*trials.judged) if trials.judged else []
        self.judge = load_scene_judge(MODELS["mini"]) if trials.judged else None

    def score(self, task: Trial) -> dict:
        """Returns the row of a trial: metrics by prompt, and whether each challenge was passed.

        Raises:
            ValueError: If a weight or an image is NaN or infinite.
        """
        with all_quantized(self.images.pipe.unet, self.recipes[task.name], self.scales):
            images = self.images.draw()
        row = asdict(task) | self.images.measure(images)
        if self.judge is not None:
            seen = read_scenes(self.judge, to_float(images.numpy()))
            row["passed"] = [passes(c, s) for c, s in zip(self.asked, seen, strict=True)]
        return row


@contextmanager
def all_quantized(
    unet: nn.Module, levels: Mapping[str, int], scales: Scales | None = None
) -> Iterator[None]:
    """Quantizes layers for the duration of the block, then puts their weights back bit for bit.

    Arguments:
        unet: The model.
        levels: The levels of each layer, by its name.
        scales: Scales that are known; those that are not are added. To find them takes most of
            the time, and many recipes have the same ones.

    Raises:
        ValueError: If a layer's weight cannot be quantized; it says which layer it is.
    """
    scales = {} if scales is None else scales
    kept: dict[str, Tensor] = {}
    try:
        for name, count in levels.items():
            weight = unet.get_submodule(name).weight
            kept[name] = weight.detach().clone()
            try:
                if (name, count) not in scales:
                    scales[name, count] = alternating_scale(kept[name], count)
                approximation = fake_quantize(kept[name], scales[name, count], count)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            with torch.no_grad():
                weight.copy_(approximation)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                unet.get_submodule(name).weight.copy_(weight)


def trial_table(rows: Iterable[Mapping], names: Sequence[str]) -> pd.DataFrame:
    """Returns the trials in the order of `names`, with each metric averaged over prompts.

    Returns:
        Columns name, mse (squared units of 0..255), psnr (dB), perceptual, clip, clip_drop, and
        where images were judged, scene (the share of challenges passed).
    """
    found = {row["name"]: row for row in rows}
    reference = np.array(found[FULL]["clip"])
    records = []
    for name in names:
        row = found[name]
        record = {"name": name} | {m: np.mean(row[m]) for m in ("mse", "psnr", "perceptual")}
        record |= {"clip": np.mean(row["clip"]), "clip_drop": np.mean(reference - row["clip"])}
        records.append(record | ({"scene": np.mean(row["passed"])} if "passed" in row else {}))
    return pd.DataFrame(records)


def score_intervals(
    rows: Iterable[Mapping], names: Sequence[str], scores: Sequence[str]
) -> pd.DataFrame:
    """Returns scores of trials with their 95 % intervals: what other prompts might have given.

    Arguments:
        rows: Those of `Trials`.
        names: Which trials, in this order.
        scores: Of "mse", "psnr", "perceptual", "clip" and "passed".

    Returns:
        Columns name, score, value, low and high.
    """
    found = {row["name"]: row for row in rows}
    return pd.DataFrame(
        {"name": name, "score": score} | _mean(np.array(found[name][score], float))
        for score in scores
        for name in names
    )


def difference(rows: Iterable[Mapping], first: str, second: str, score: str) -> dict[str, float]:
    """Returns by how much the first trial's mean score is above the second's, prompt by prompt.

    Both draw the same prompts from the same seeds, so the interval is that of paired differences.

    Returns:
        The values value, low and high (95 %, over prompts).
    """
    found = {row["name"]: row for row in rows}
    return _mean(np.array(found[first][score], float) - np.array(found[second][score], float))


def in_words(found: Mapping[str, float]) -> str:
    """Returns a difference and its interval as text: `+12 (-3 to +27)`."""
    return f"{found['value']:+,.0f} ({found['low']:+,.0f} to {found['high']:+,.0f})"


def _mean(values: np.ndarray) -> dict[str, float]:
    low, high = interval(np.mean, values, method="percentile")
    return {"value": float(values.mean()), "low": low, "high": high}
