"""What every candidate does to the noise of single steps, measured by running the UNet again.

Of each sample one step of its way is kept: latents, time and caption. With layer i quantized, the
parts of the UNet that run before it give what they gave in full precision, so only the rest is
computed: about half of the UNet, on average over layers.
"""

__all__ = ["noise_errors", "remembered", "resumed"]

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.grids import levels_of_bits
from bf_lib.layers import Layer
from bf_lib.sampling import PromptEmbeds, Sampler
from bf_lib.sensitivity.candidates import quantized
from bf_lib.sensitivity.trajectory import Step, recorded

# A resnet, a transformer or a change of resolution: what runs one after the other in a block.
PART = re.compile(r"(down_blocks|up_blocks|mid_block)(\.\d+)?\.\w+\.\d+")


@torch.no_grad()
def noise_errors(
    pipe: StableDiffusionPipeline,
    layers: Sequence[Layer],
    bits: Sequence[int],
    embeds: PromptEmbeds,
    seeds: Sequence[int],
    sampler: Sampler,
) -> Tensor:
    """Returns the mean squared error of the guided noise, of each sample at one step of its way.

    Arguments:
        pipe: The model.
        layers: The layers that are quantized, one at a time.
        bits: The bit-widths of each.
        embeds: The text of each sample.
        seeds: The seed of each sample.
        sampler: How the way of a sample is found; its batch size does not matter.

    Returns:
        The errors in float64, with shape (layers, bits, samples).
    """
    step = _spread(recorded(pipe, embeds, seeds, sampler), len(seeds))
    reference = _guided(step.noise, sampler)
    with remembered(pipe.unet) as parts:
        _run(pipe.unet, step)
    errors = []
    for layer in layers:
        with resumed(parts, layer.name):
            for b in bits:
                with quantized(pipe.unet, layer.name, levels_of_bits(b)):
                    noise = _guided(_run(pipe.unet, step), sampler)
                errors.append((noise - reference).double().square().flatten(1).mean(dim=1))
    return torch.stack(errors).cpu().view(len(layers), len(bits), len(seeds))


def _spread(steps: Sequence[Step], samples: int) -> Step:
    """Takes one step of each sample, spread evenly over the steps, into one evaluation."""
    chosen = [steps[(2 * n + 1) * len(steps) // (2 * samples)] for n in range(samples)]
    rows = range(0, len(steps[0].x), samples)  # with guidance, a sample has two rows

    def gather(name: str) -> Tensor:
        return torch.stack([getattr(s, name)[r + n] for r in rows for n, s in enumerate(chosen)])

    times = torch.stack([torch.as_tensor(step.t) for _ in rows for step in chosen])
    return Step(gather("x"), times.to(steps[0].x.device), gather("text"), gather("noise"))


def _run(unet: nn.Module, step: Step) -> Tensor:
    return unet(step.x, step.t, encoder_hidden_states=step.text, return_dict=False)[0]


def _guided(noise: Tensor, sampler: Sampler) -> Tensor:
    if not sampler.guided:
        return noise
    unconditional, conditional = noise.chunk(2)
    return unconditional + sampler.guidance * (conditional - unconditional)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of the UNet and what it gave."""

    name: str
    module: nn.Module
    output: object


@contextmanager
def remembered(unet: nn.Module) -> Iterator[list[Part]]:
    """Notes what each part of the UNet gives in the block, in order of execution."""
    parts: list[Part] = []

    def watch(name: str) -> object:
        return lambda module, _, output: parts.append(Part(name, module, output))

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in unet.named_modules()
        if PART.fullmatch(name)
    ]
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(parts: Sequence[Part], layer: str) -> Iterator[None]:
    """Lets the parts that run before a layer's give what is remembered, whatever they are given.

    Nothing is skipped for a layer that is in none of the parts.
    """
    names = [part.name for part in parts]
    within = next((n for n, name in enumerate(names) if layer.startswith(f"{name}.")), 0)
    skipped = parts[:within]
    # Others, such as accelerate, may have put a `forward` of their own on a module.
    own = [part.module.__dict__.get("forward") for part in skipped]
    for part in skipped:
        part.module.forward = lambda *_, output=part.output, **__: output
    try:
        yield
    finally:
        for part, forward in zip(skipped, own, strict=True):
            if forward is None:
                del part.module.forward  # that of its class again
            else:
                part.module.forward = forward
