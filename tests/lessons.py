"""A lesson of a toy pipeline: a teacher, examples, and students of a few time-steps."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from toys import toy_pipeline

from bf_lib.ablation_rows import ETAS, FRONTIER, frontier_name
from bf_lib.examples import Examples
from bf_lib.layers import list_layers
from bf_lib.student import quantize
from bf_lib.teaching import Lesson

# The names of the ablation's recipes.
RECIPES = ["3", "5", "optimum", "rule", "optimum as large as 5", "rule as large as 5"]
RECIPES += [f"eta {eta:g}" for eta in ETAS] + [frontier_name(bits) for bits in FRONTIER]

TIMES = list(range(50, 1000, 100))  # the students have features of


def toy_lesson(folder: Path) -> Lesson:
    """Saves a pipeline and examples of it; returns a lesson with them, at `TIMES` alone."""
    toy_pipeline().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.1]).repeat_interleave(4).view(1, 8, 1, 1)
    moments = torch.randn(6, 8, 8, 8, generator=generator) * spread
    captions = tuple((f"caption {letter}",) for letter in "abcdef")
    examples = folder / "examples.safetensors"
    Examples(moments.half(), captions, 0.8).save(examples)
    density = torch.zeros(1000)
    density[TIMES] = 1 / len(TIMES)
    return Lesson(model=folder, examples=examples, density=tuple(density.tolist()))


def ternary(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A student whose layers all have three levels."""
    return quantize(unet, {layer.name: 3 for layer in list_layers(unet)}, TIMES)


def same(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A student that is the teacher."""
    return unet


def seeded() -> torch.Generator:
    """A source of the same random numbers each time."""
    return torch.Generator().manual_seed(1)
