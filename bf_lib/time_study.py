"""What caching time features changes, and what quantizing the time layers would (§4.1, App. C)."""

__all__ = ["SCHEDULERS", "caching_differences", "sets_like"]

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from bf_lib.layers import Layer
from bf_lib.sampling import PromptEmbeds, Sampler, decode, denoise
from bf_lib.timecache import cache_time_features_, sampling_steps

SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "PNDM": PNDMScheduler,
    "Euler": EulerDiscreteScheduler,
}
# What only some schedulers know, as SD-v1.5's own configuration has it.
LIKE_SD15 = {"skip_prk_steps": True, "clip_sample": False, "set_alpha_to_one": False}


@torch.inference_mode()
def caching_differences(
    pipe: StableDiffusionPipeline, embeds: PromptEmbeds, seeds: Sequence[int], sampler: Sampler
) -> pd.DataFrame:
    """Draws with and without a cache, one for all schedulers, and compares.

    Arguments:
        pipe: The pipeline; its scheduler's configuration is given to all of them.
        embeds: The prompts, all drawn at once.
        seeds: The seed of each.
        sampler: Steps and guidance.

    Returns:
        Columns scheduler, steps (that it asks of the UNet), features ("float32" or "float16"),
        latents (the largest difference over the largest latent), mse (of the images, squared
        units of 0..255) and changed (the share of image values that differ).
    """
    config = dict(pipe.scheduler.config) | LIKE_SD15
    kinds = {name: kind.from_config(config) for name, kind in SCHEDULERS.items()}
    steps = {name: sampling_steps(kind, sampler.steps) for name, kind in kinds.items()}
    parts = dict(pipe.components)
    rows = []
    for dtype in (torch.float32, torch.float16):
        cached = copy.deepcopy(pipe.unet)
        cache_time_features_(cached, torch.cat([*steps.values()]), dtype)
        for name, scheduler in kinds.items():
            pipes = [
                type(pipe)(
                    **parts | {"unet": unet, "scheduler": scheduler}, requires_safety_checker=False
                )
                for unet in (pipe.unet, cached)
            ]
            full, ours = (denoise(p, embeds, seeds, sampler) for p in pipes)
            images = [decode(pipe, latents).double() for latents in (full, ours)]
            change = images[1] - images[0]
            rows.append(
                {
                    "scheduler": name,
                    "steps": len(steps[name]),
                    "features": str(dtype).removeprefix("torch."),
                    "latents": float((ours - full).abs().max() / full.abs().max()),
                    "mse": float(change.square().mean()),
                    "changed": float((change != 0).double().mean()),
                }
            )
    return pd.DataFrame(rows)


def sets_like(layers: Sequence[Layer], weights: int, count: int, seed: int) -> list[list[Layer]]:
    """Returns random sets of layers that have nearly so many weights together, and not more.

    Layers are drawn in random order; one that would be too much is left out.

    Arguments:
        layers: To draw from.
        weights: The weights that each set should have.
        count: How many sets.
        seed: Of the draws.
    """
    sets = []
    for n in range(count):
        chosen: list[Layer] = []
        left = weights
        for place in np.random.default_rng((seed, n)).permutation(len(layers)):
            if layers[place].params <= left:
                chosen.append(layers[place])
                left -= layers[place].params
        sets.append(chosen)
    return sets
