"""Images from prompts, with a seed for each sample.

The denoising loop does what `StableDiffusionPipeline` does with classifier-free guidance, but a
sample depends on its own prompt and seed alone: its noise comes from a generator of its own, its
text is encoded by itself, and batches are all of one size (the last one is padded). The same
prompt and seed give the same image whatever the batch size, the order or the shard; bit for bit
where batch size and number of threads are the same, since then each sum is taken in the same
order, and within float rounding otherwise.
"""

__all__ = [
    "PromptEmbeds",
    "Sampler",
    "decode",
    "denoise",
    "encode_prompts",
    "generate",
    "generate_in_processes",
    "generators_of",
    "initial_latents",
    "latent_shape",
    "unet_evaluations",
]

import copy
import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bf_lib.models import load_pipeline
from bf_lib.processes import end_with_parent, make_deterministic


@dataclass(frozen=True, slots=True)
class Sampler:
    """How images are sampled; by which scheduler is a matter of the pipeline."""

    steps: int  # of the scheduler
    guidance: float = 7.5  # scale of classifier-free guidance; 1 turns it off
    batch: int = 16  # images at once; the UNet sees twice as many with guidance
    eta: float = 0.0  # noise of schedulers that have it as an option (DDIM)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise ValueError(f"guidance must be at least 1, got {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    @property
    def guided(self) -> bool:
        return self.guidance > 1


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeds:
    """Prompts as the UNet reads them: encoded once, used for any number of images."""

    prompts: Tensor  # (n, tokens, width)
    empty: Tensor  # (1, tokens, width); the empty prompt, for guidance

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: slice | Sequence[int]) -> "PromptEmbeds":
        return PromptEmbeds(self.prompts[index], self.empty)


@torch.inference_mode()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> PromptEmbeds:
    """Encodes prompts, and the empty one, as the pipeline does.

    Each is encoded by itself, so that its embedding does not depend on its neighbours.
    """
    known: dict[str, Tensor] = {}
    for prompt in ["", *prompts]:
        if prompt not in known:
            known[prompt], _ = pipe.encode_prompt([prompt], pipe.device, 1, False)
    empty = known[""]
    return PromptEmbeds(torch.cat([empty[:0], *(known[prompt] for prompt in prompts)]), empty)


def latent_shape(pipe: StableDiffusionPipeline) -> tuple[int, int, int]:
    """Returns the shape (channels, height, width) of the latents of one image."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns a source of randomness for each sample; on the CPU, so all devices agree."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_latents(
    generators: Sequence[torch.Generator],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws standard normal noise, each sample from its own generator.

    It is drawn in single precision on the generators' device and then cast, so that a seed means
    the same noise in every precision.

    Arguments:
        generators: The source of randomness of each sample.
        shape: The shape of one sample's latents.
        dtype: The type of the result.

    Returns:
        The noise, with shape (n, *shape).
    """
    return torch.stack(
        [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
    ).to(dtype)


def unet_evaluations(pipe: StableDiffusionPipeline, images: int, sampler: Sampler) -> int:
    """Counts the UNet evaluations, one a latent and time-step, that images take.

    A guided step takes two. Those spent on the padding of a last batch are not counted.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(sampler.steps)
    return images * len(scheduler.timesteps) * (2 if sampler.guided else 1)


@torch.inference_mode()
def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str] | PromptEmbeds,
    seeds: Sequence[int],
    sampler: Sampler,
) -> Tensor:
    """Generates an image for each prompt, with the seed of the same place.

    The pipeline's scheduler is copied, never changed.

    Arguments:
        pipe: The models and the scheduler.
        prompts: The prompts, or their embeddings.
        seeds: The seed of each sample.
        sampler: Steps, guidance and batch size.

    Returns:
        The images as uint8 on the CPU, with shape (n, height, width, 3).
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"there are {len(prompts)} prompts but {len(seeds)} seeds")
    if len(seeds) == 0:
        raise ValueError("there is nothing to generate: no prompts were given")
    embeds = prompts if isinstance(prompts, PromptEmbeds) else encode_prompts(pipe, prompts)
    images = []
    for start in range(0, len(seeds), sampler.batch):
        count = min(sampler.batch, len(seeds) - start)
        # The last sample fills up a batch, so that all batches have the same shape.
        index = [start + min(i, count - 1) for i in range(sampler.batch)]
        latents = denoise(pipe, embeds[index], [seeds[i] for i in index], sampler)
        images.append(decode(pipe, latents)[:count])
    return torch.cat(images)


def generate_in_processes(
    model: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    processes: int = 2,
    threads: int = 1,
) -> Tensor:
    """Generates the same images as `generate`, shared by processes on the CPU.

    Two processes of one thread draw more than one process of two: `make speed` measures how much.

    Arguments:
        model: The name, folder or hub id of the pipeline, which each process loads.
        prompts: The prompts.
        seeds: The seed of each sample.
        sampler: Steps, guidance and batch size.
        processes: How many processes share the samples.
        threads: Threads of each process.

    Returns:
        The images as uint8, with shape (n, height, width, 3).
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
    size = math.ceil(len(seeds) / processes)
    starts = range(0, len(seeds), size)
    shares = [(prompts[i : i + size], seeds[i : i + size]) for i in starts]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = [pool.submit(_share, model, *share, sampler, threads) for share in shares]
        return torch.from_numpy(np.concatenate([part.result() for part in parts]))


def _share(
    model: str | Path, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, threads: int
) -> np.ndarray:
    end_with_parent()
    make_deterministic(threads)
    return generate(load_pipeline(model), prompts, seeds, sampler).numpy()


@torch.inference_mode()
def decode(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Decodes one batch of latents with shape (n, *) to images.

    Returns:
        The images as uint8 on the CPU, with shape (n, height, width, 3).

    Raises:
        ValueError: If an image has values that are NaN or infinite.
    """
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    if not pixels.isfinite().all():
        raise ValueError("an image has values that are NaN or infinite")
    unit = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (unit.float() * 255).round().to(torch.uint8).cpu()


def denoise(
    pipe: StableDiffusionPipeline, embeds: PromptEmbeds, seeds: Sequence[int], sampler: Sampler
) -> Tensor:
    """Runs the scheduler from noise to latents, one batch at once.

    Gradients flow where they are enabled, as far as the scheduler lets them.

    Arguments:
        pipe: The UNet and the scheduler, which is copied.
        embeds: The text of each sample.
        seeds: The seed of each sample.
        sampler: Steps and guidance.

    Returns:
        The latents, with shape (n, channels, height, width).
    """
    unet, text = pipe.unet, embeds.prompts
    scheduler = copy.deepcopy(pipe.scheduler)  # schedulers carry state from step to step
    scheduler.set_timesteps(sampler.steps, device=text.device)
    generators = generators_of(seeds)
    options = _step_options(scheduler, generators, sampler.eta)
    latents = initial_latents(generators, latent_shape(pipe), text.dtype).to(text.device)
    latents = latents * scheduler.init_noise_sigma
    if sampler.guided:
        text = torch.cat([embeds.empty.expand_as(text), text])
    for t in scheduler.timesteps:
        x = torch.cat([latents, latents]) if sampler.guided else latents
        x = scheduler.scale_model_input(x, t)
        noise = unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
        if sampler.guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + sampler.guidance * (conditional - unconditional)
        latents = scheduler.step(noise, t, latents, return_dict=False, **options)[0]
    return latents


def _step_options(
    scheduler: object, generators: list[torch.Generator], eta: float
) -> dict[str, object]:
    """Returns what a scheduler's step takes beside its three main arguments."""
    offered = {"generator": generators, "eta": eta}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in offered.items() if name in accepted}
