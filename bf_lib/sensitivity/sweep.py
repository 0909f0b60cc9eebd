"""The sweep: each layer quantized alone, the images compared (BitsFusion, §3.2 and App. B).

For every layer i and b in {1, 2, 3}, layer i alone is quantized to 2^b + 1 balanced levels with
the alternating scale (§4.1), the same prompts are drawn from the same seeds, and the images are
compared with those of the full-precision model: MSE, PSNR, a perceptual distance and the drop of
the CLIP score. The paper also fine-tunes each candidate before it is scored: see `trained`.
"""

__all__ = ["Bench", "Sweep"]

import math
from dataclasses import asdict, dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.grids import levels_of_bits
from bf_lib.metrics import clip_score, load_metrics, mse, psnr
from bf_lib.models import load_pipeline
from bf_lib.sampling import Sampler, encode_prompts, generate
from bf_lib.sensitivity.candidates import (
    FULL_PRECISION,
    Candidate,
    candidates,
    chosen_layers,
    quantized,
)


@dataclass(frozen=True)
class Sweep:
    """All that the rows of a sweep depend on: a job for `bf_lib.jobs`."""

    model: str  # preset, folder or hub id
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # one for each prompt
    sampler: Sampler
    bits: tuple[int, ...] = (1, 2, 3)
    layers: tuple[str, ...] | None = None  # None is every quantizable layer
    metrics: str = "mini"  # as `metrics.load_metrics` names them
    threads: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts) or not self.prompts:
            raise ValueError(f"{len(self.prompts)} prompts with {len(self.seeds)} seeds")

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model that is swept; channels come last, which is faster for convolutions."""
        pipe = load_pipeline(self.model, device=device, dtype=getattr(torch, self.dtype))
        pipe.unet.to(memory_format=torch.channels_last)
        return pipe

    def judges(self) -> list[nn.Module]:
        """Loads what images are judged by."""
        perceptual, clip = load_metrics(self.metrics)
        return [perceptual.trunk, clip.model]

    def tasks(self, unet: nn.Module) -> list[Candidate]:
        """Lists full precision, and then the candidates, layers in order of execution.

        Raises:
            ValueError: If a layer's name is not that of a quantizable layer.
        """
        return [FULL_PRECISION, *candidates(chosen_layers(unet, self.layers), self.bits)]

    def bench(self, pipe: StableDiffusionPipeline) -> "Bench":
        """Returns what scores the candidates, with the images of full precision drawn."""
        return Bench(self, pipe)


class Bench:
    """A loaded model, the images it draws in full precision, and what they are compared by."""

    def __init__(
        self, sweep: Sweep, pipe: StableDiffusionPipeline, reference: Tensor | None = None
    ) -> None:
        self.sweep = sweep
        self.pipe = pipe
        self.perceptual, self.clip = load_metrics(sweep.metrics, pipe.device)
        self.embeds = encode_prompts(self.pipe, sweep.prompts)
        self.text = self.clip.embed_texts(sweep.prompts)
        self.reference = self.draw() if reference is None else reference
        self.features = self.perceptual.features(self.reference)

    def draw(self) -> Tensor:
        """Draws the prompts with the model as it now is, as uint8 with shape (n, h, w, 3)."""
        return generate(self.pipe, self.embeds, self.sweep.seeds, self.sweep.sampler)

    def measure(self, images: Tensor) -> dict[str, list[float]]:
        """Compares images with the full-precision ones, prompt by prompt."""
        # Identical images have no finite PSNR: they count as one value off by one.
        finest = 10 * math.log10(255**2 * self.reference[0].numel())
        perceived = self.perceptual.distance(self.features, self.perceptual.features(images))
        return {
            "mse": mse(images, self.reference).tolist(),
            "psnr": psnr(images, self.reference).clamp_max(finest).tolist(),
            "perceptual": perceived.tolist(),
            "clip": clip_score(self.clip.embed_images(images), self.text).tolist(),
        }

    def score(self, task: Candidate) -> dict:
        """Returns the row of a candidate.

        Raises:
            ValueError: If the weight or an image is NaN or infinite.
        """
        if task == FULL_PRECISION:
            # Drawn again: what differs from the first time is noise, in every row.
            return asdict(task) | {"weight_mse": 0.0} | self.measure(self.draw())
        with quantized(self.pipe.unet, task.layer, levels_of_bits(task.bits)) as error:
            return asdict(task) | {"weight_mse": error} | self.measure(self.draw())
