"""The fast estimate: all sensitivities from few passes, at a hundredth of the sweep's cost.

Three ways, all with the full-precision model's own latents and guidance:

- "image gradient": random projections of the images, pulled back through the decoder and the
  whole way of the latents. It alone knows what a change does to the steps after it, and its
  values are in the units of the sweep's MSE.
- "noise gradient": random projections of the noise, pulled back through each step by itself.
- "single step": the noise of one step of each sample, with each candidate in its turn.
"""

__all__ = ["METHODS", "Estimate", "Portion", "byte_error", "combined", "estimate"]

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.grids import levels_of_bits
from bf_lib.layers import Layer
from bf_lib.models import load_pipeline
from bf_lib.sampling import PromptEmbeds, Sampler, encode_prompts
from bf_lib.sensitivity.candidates import chosen_layers
from bf_lib.sensitivity.gradients import (
    Deltas,
    image_projections,
    noise_projections,
    weight_deltas,
)
from bf_lib.sensitivity.single_step import noise_errors

METHODS = ("image gradient", "noise gradient", "single step")


def estimate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    sampler: Sampler,
    *,
    method: str = "image gradient",
    projections: int = 4,
    bits: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Estimates how much each layer, alone at each bit-width, changes the images of a model.

    Notebook 03 shows how well that ranks the layers of `mini`, against its cost. To share the work
    among processes, run an `Estimate` with `bf_lib.jobs`.

    Arguments:
        pipe: The model, on its device. Activations of a batch are kept for the way back.
        prompts: What to draw.
        sampler: How images are sampled, and how many prompts are taken at once.
        method: One of `METHODS`.
        projections: How many for each prompt; "single step" takes none.
        bits: The paper's b, for 2^b + 1 levels.
        seeds: The seed of each prompt; by default 0, 1, 2, ...

    Returns:
        One row a candidate, in order of execution and bits, with columns layer, role, block,
        depth, params, bits, levels, error (the mean over prompts: for "image gradient" the
        expected MSE in squared units of 0..255, else that of the noise) and score (the square of
        the mean root over prompts, to rank layers by: single prompts weigh less in it).
    """
    job = Estimate(
        model="",
        prompts=tuple(prompts),
        seeds=tuple(range(len(prompts)) if seeds is None else seeds),
        sampler=sampler,
        method=method,
        projections=projections,
        bits=tuple(bits),
    )
    bench = job.bench(pipe)
    return combined([bench.score(task) for task in job.tasks(pipe.unet)], bench.layers, job.bits)


@dataclass(frozen=True, slots=True)
class Portion:
    """Some of the prompts, which are taken at once."""

    start: int
    count: int

    @property
    def label(self) -> tuple[str, str]:
        """What to call its work."""
        return "estimate", f"prompts {self.start} to {self.start + self.count - 1}"


@dataclass(frozen=True)
class Estimate:
    """All that the rows of an estimate depend on: a job for `bf_lib.jobs`."""

    model: str  # preset, folder or hub id
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # one for each prompt
    sampler: Sampler
    method: str = "image gradient"
    projections: int = 4
    bits: tuple[int, ...] = (1, 2, 3)
    layers: tuple[str, ...] | None = None  # None is every quantizable layer
    threads: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts) or not self.prompts:
            raise ValueError(f"{len(self.prompts)} prompts with {len(self.seeds)} seeds")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.projections < 1:
            raise ValueError(f"projections must be at least 1, got {self.projections}")

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model."""
        return load_pipeline(self.model, device=device, dtype=getattr(torch, self.dtype))

    def judges(self) -> list[nn.Module]:
        """No other networks take part."""
        return []

    def tasks(self, unet: nn.Module) -> list[Portion]:
        """Lists portions of the prompts, of the sampler's batch size."""
        # One step of each sample is taken, and which one depends on all the others.
        size = len(self.prompts) if self.method == "single step" else self.sampler.batch
        starts = range(0, len(self.prompts), size)
        return [Portion(start, min(size, len(self.prompts) - start)) for start in starts]

    def bench(self, pipe: StableDiffusionPipeline) -> "EstimateBench":
        """Returns what estimates portions, with the layers quantized once for all of them."""
        return EstimateBench(self, pipe)


class EstimateBench:
    """A loaded model, and what quantization adds to the weight of each layer."""

    def __init__(self, job: Estimate, pipe: StableDiffusionPipeline) -> None:
        self.job, self.pipe = job, pipe
        self.layers = chosen_layers(pipe.unet, job.layers)
        known = encode_prompts(pipe, job.prompts)
        # Clones, because tensors of inference mode can have no part in a gradient.
        self.embeds = PromptEmbeds(known.prompts.clone(), known.empty.clone())
        self.deltas: Deltas | None = None
        if job.method != "single step":
            self.deltas = weight_deltas(pipe.unet, self.layers, job.bits)

    def score(self, task: Portion) -> dict:
        """Returns the row of a portion: errors by layer, bits and prompt, and the seconds.

        Raises:
            ValueError: If an error is NaN or infinite.
        """
        since = time.perf_counter()
        errors = self._errors(slice(task.start, task.start + task.count))
        if not errors.isfinite().all():
            raise ValueError("an error is NaN or infinite")
        seconds = time.perf_counter() - since
        return asdict(task) | {"errors": errors.tolist(), "seconds": seconds}

    def _errors(self, part: slice) -> Tensor:
        """Returns the errors of some prompts, with shape (layers, bits, prompts)."""
        job = self.job
        where = self.embeds[part], job.seeds[part], job.sampler
        if job.method == "single step":
            return noise_errors(self.pipe, self.layers, job.bits, *where)
        if job.method == "noise gradient":
            found = noise_projections(self.pipe, self.deltas, *where, job.projections)
            return _typical(found.square().mean(dim=-2), dim=0)
        found = image_projections(self.pipe, self.deltas, *where, job.projections)
        return byte_error(found.square().mean(dim=-2))


def combined(
    rows: Iterable[Mapping], layers: Sequence[Layer], bits: Sequence[int]
) -> pd.DataFrame:
    """Returns the estimate of each candidate, from the rows of all portions.

    Arguments:
        rows: What `jobs.run_job` yields for an `Estimate`, in any order.
        layers: The layers that were estimated, in order of execution.
        bits: The bit-widths.

    Returns:
        The table that `estimate` describes.
    """
    parts = [row["errors"] for row in sorted(rows, key=lambda row: row["start"])]
    errors = torch.cat([torch.tensor(part, dtype=torch.float64) for part in parts], dim=-1)
    return pd.DataFrame(
        {
            "layer": layer.name,
            "role": layer.role,
            "block": layer.block,
            "depth": layer.depth,
            "params": layer.params,
            "bits": b,
            "levels": levels_of_bits(b),
            "error": float(error.mean()),
            "score": float(_typical(error)),
        }
        for layer, of_layer in zip(layers, errors, strict=True)
        for b, error in zip(bits, of_layer, strict=True)
    )


def _typical(errors: Tensor, dim: int = -1) -> Tensor:
    """Averages the roots of squared errors, and squares: a few that are very large weigh less.

    To first order an error has no bound, while that of an image has.
    """
    return errors.sqrt().mean(dim=dim).square()


def byte_error(squared: Tensor) -> Tensor:
    """Returns the expected squared error of bytes, given that of values before they are rounded.

    A change d of a value with a random fraction moves its rounded value by the whole numbers next
    to d, on average by d, and so by d^2 + f (1 - f) squared, f being the fraction of |d|. Small
    changes thus count as |d|. The mean is over normal d of the given mean square.

    Arguments:
        squared: The mean square of d in squared units of 0..255, of any shape.
    """
    places = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal = torch.special.ndtri(places)
    total = torch.zeros_like(squared)
    for z in normal:
        change = squared.sqrt() * z.abs()
        fraction = change % 1
        total += change.square() + fraction * (1 - fraction)
    return total / QUANTILES


QUANTILES = 200  # of the normal distribution, in place of an integral
