"""The way of the latents: what the UNet was asked and answered, and the scheduler by itself."""

__all__ = ["Step", "recorded", "replayed"]

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bf_lib.sampling import PromptEmbeds, Sampler, denoise


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One evaluation of the UNet; with guidance a sample has two rows."""

    x: Tensor  # (rows, channels, height, width)
    t: Tensor
    text: Tensor  # (rows, tokens, width)
    noise: Tensor  # (rows, channels, height, width)


@torch.no_grad()
def recorded(
    pipe: StableDiffusionPipeline, embeds: PromptEmbeds, seeds: Sequence[int], sampler: Sampler
) -> list[Step]:
    """Draws the latents, and returns all that the UNet was asked and answered."""
    steps: list[Step] = []

    def unet(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **options: bool) -> tuple:
        noise = pipe.unet(x, t, encoder_hidden_states=encoder_hidden_states, **options)[0]
        steps.append(Step(x, t, encoder_hidden_states, noise))
        return (noise,)

    denoise(_with_unet(pipe, unet), embeds, seeds, sampler)
    return steps


def replayed(
    pipe: StableDiffusionPipeline,
    noise: Sequence[Tensor],
    embeds: PromptEmbeds,
    seeds: Sequence[int],
    sampler: Sampler,
) -> tuple[list[Tensor], Tensor]:
    """Runs the scheduler alone, on noise that is given; returns the UNet's inputs and the latents.

    Both are then functions of the noise that gradients can be taken of.
    """
    inputs: list[Tensor] = []

    def unet(x: Tensor, *_: object, **options: object) -> tuple:
        inputs.append(x)
        return (noise[len(inputs) - 1],)

    latents = denoise(_with_unet(pipe, unet), embeds, seeds, sampler)
    return inputs, latents


def _with_unet(pipe: StableDiffusionPipeline, unet: object) -> SimpleNamespace:
    """Stands for a pipeline with another UNet, as far as `denoise` asks."""
    unet.config = pipe.unet.config
    return SimpleNamespace(unet=unet, scheduler=pipe.scheduler)
