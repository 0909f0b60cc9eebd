"""What every candidate does to noise or image, to first order, from a few backward passes.

A layer with the weight W + D instead of W moves its output by D x, where x is its input, and so
moves what is computed from it by J D x to first order, J being the Jacobian with respect to the
layer's output. With random v of E[v v^T] = I,

    E <v, J D x>^2 = |J D x|^2,

and one backward pass gives v^T J for all layers at once. So a few passes estimate the squared
change of the result for every layer and every D of it, sample by sample; weights need no
gradients, which halves the cost of a pass.

The result is the guided noise of single steps (`noise_projections`), or the final image with the
whole way of the latents to it (`image_projections`). The way is walked back step by step, with
one step's activations in memory at a time.
"""

__all__ = [
    "Deltas",
    "image_projections",
    "noise_projections",
    "weight_deltas",
]

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.grids import alternating_scale, fake_quantize, levels_of_bits
from bf_lib.layers import Layer, get_layer
from bf_lib.sampling import PromptEmbeds, Sampler, generators_of, latent_shape
from bf_lib.sensitivity.seeds import derived_seeds
from bf_lib.sensitivity.trajectory import Step, recorded, replayed

Deltas = dict[str, Tensor]  # layer -> what quantization adds to its weight, (bits, out, *)

PIXELS = 127.5  # from the decoder's -1..1 to the bytes of images


@torch.no_grad()
def weight_deltas(unet: nn.Module, layers: Sequence[Layer], bits: Sequence[int]) -> Deltas:
    """Returns what quantizing each layer adds to its weight, at each bit-width."""
    return {layer.name: _deltas(get_layer(unet, layer.name).weight, bits) for layer in layers}


def _deltas(weight: Tensor, bits: Sequence[int]) -> Tensor:
    grids = [levels_of_bits(b) for b in bits]
    rounded = [fake_quantize(weight, alternating_scale(weight, n), n) for n in grids]
    return torch.stack(rounded) - weight


def image_projections(
    pipe: StableDiffusionPipeline,
    deltas: Deltas,
    embeds: PromptEmbeds,
    seeds: Sequence[int],
    sampler: Sampler,
    projections: int,
) -> Tensor:
    """Returns random projections of the change of images with each candidate.

    The mean of their squares is the estimated mean squared error of an image, in squared units of
    0..255. Samples are taken all at once.

    Arguments:
        pipe: The model.
        deltas: What each layer's quantization adds to its weight.
        embeds: The text of each sample.
        seeds: The seed of each sample, of its noise and its projections.
        sampler: How images are sampled; its batch size does not matter.
        projections: How many for each sample.

    Returns:
        The projections in float64, with shape (layers, bits, projections, samples).
    """
    steps = recorded(pipe, embeds, seeds, sampler)
    leaves = [step.noise.clone().requires_grad_() for step in steps]
    with _frozen(pipe.unet, pipe.vae), torch.enable_grad():
        inputs, latents = replayed(pipe, leaves, embeds, seeds, sampler)
        pulled = _through_decoder(pipe, latents.detach(), _directions(pipe, seeds, projections))
        total = torch.zeros(())
        later: list[Tensor] = []  # what pulls at the inputs of the steps after this one
        for n in reversed(range(len(steps))):
            (pull,) = torch.autograd.grad(
                [latents, *inputs[n + 1 :]],
                leaves[n],
                [pulled, *later],
                retain_graph=True,
                is_grads_batched=True,
            )
            products, at_input = _pull_back(pipe.unet, deltas, steps[n], pull)
            total = total + _per_sample(products, len(seeds))
            later.insert(0, at_input)
    return total


def noise_projections(
    pipe: StableDiffusionPipeline,
    deltas: Deltas,
    embeds: PromptEmbeds,
    seeds: Sequence[int],
    sampler: Sampler,
    projections: int,
) -> Tensor:
    """Returns random projections of the change of the guided noise, at each step by itself.

    The steps are those of the full-precision model. The mean of the squares is the estimated mean
    squared error of the noise. Arguments are as for `image_projections`.

    Returns:
        The projections in float64, with shape (steps, layers, bits, projections, samples).
    """
    shape = latent_shape(pipe)
    generators = _generators(seeds)
    found = []
    with _frozen(pipe.unet), torch.enable_grad():
        for step in recorded(pipe, embeds, seeds, sampler):
            pull = _random(generators, (projections, *shape)).to(step.noise)
            pull = pull / math.sqrt(math.prod(shape))
            if sampler.guided:
                pull = torch.cat([(1 - sampler.guidance) * pull, sampler.guidance * pull], dim=1)
            products, _ = _pull_back(pipe.unet, deltas, step, pull)
            found.append(_per_sample(products, len(seeds)))
    return torch.stack(found)


# ---- backward passes


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns a source of projections for each sample, other than that of its noise."""
    return generators_of(derived_seeds("projections", seeds))


def _random(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draws normal numbers, each sample's from its own generator: (shape[0], samples, ...)."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators], dim=1)


def _directions(pipe: StableDiffusionPipeline, seeds: Sequence[int], count: int) -> Tensor:
    """Draws directions of images, with shape (count, samples, channels, height, width)."""
    _, height, width = latent_shape(pipe)
    side = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    shape = (pipe.vae.config.out_channels, side * height, side * width)
    directions = _random(_generators(seeds), (count, *shape))
    return directions * (PIXELS / math.sqrt(math.prod(shape)))


def _through_decoder(pipe: StableDiffusionPipeline, latents: Tensor, directions: Tensor) -> Tensor:
    """Pulls directions of images back to the latents, one sample at a time."""
    pulled = torch.empty(len(directions), *latents.shape).to(latents)
    for n in range(len(latents)):
        z = latents[n : n + 1].requires_grad_()
        pixels = pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0]
        pixels = pixels.clamp(-1, 1)  # beyond black and white nothing changes
        for k, direction in enumerate(directions[:, n : n + 1].to(pixels)):
            keep = k < len(directions) - 1
            pulled[k, n] = torch.autograd.grad(pixels, z, direction, retain_graph=keep)[0][0]
    return pulled


def _pull_back(
    unet: nn.Module, deltas: Deltas, step: Step, pulls: Tensor
) -> tuple[Tensor, Tensor]:
    """Pulls directions of the noise back to every layer's output and to the input.

    Arguments:
        unet: The model.
        deltas: What is added to the weight of each layer.
        step: The evaluation of the UNet.
        pulls: The directions, with shape (projections, rows, channels, height, width).

    Returns:
        The products with what each delta adds to its layer's output, in float64 with shape
        (layers, bits, projections, rows), and the directions at the input, shaped as `pulls`.
    """
    x = step.x.detach().requires_grad_()
    with _watched(unet, deltas) as (outputs, moved):
        noise = unet(x, step.t, encoder_hidden_states=step.text, return_dict=False)[0]
    order = [outputs[name] for name in deltas]
    products, at_input = [], []
    for k, pull in enumerate(pulls):
        keep = k < len(pulls) - 1
        first, *pulled = torch.autograd.grad(noise, [x, *order], pull, retain_graph=keep)
        at_input.append(first)
        rows = [_products(moved[name], each) for name, each in zip(deltas, pulled, strict=True)]
        products.append(torch.stack(rows).cpu())  # (layers, bits, rows)
    return torch.stack(products, dim=2), torch.stack(at_input)


def _products(moved: Tensor, pulled: Tensor) -> Tensor:
    """Returns the inner products over each row, in float64; half precision would underflow."""
    kind = torch.promote_types(moved.dtype, torch.float32)
    return (moved.to(kind) * pulled.to(kind)).flatten(2).sum(dim=2, dtype=torch.float64)


def _per_sample(products: Tensor, samples: int) -> Tensor:
    """Adds up the rows of a sample: without and with its text."""
    return products.unflatten(-1, (-1, samples)).sum(dim=-2)


@contextmanager
def _watched(
    unet: nn.Module, deltas: Deltas
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Notes, in one forward pass, each layer's output and what its deltas would add to it.

    Yields:
        The outputs with shape (rows, *), and the additions with shape (bits, rows, *), by layer.
    """
    outputs: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            with torch.no_grad():
                moved[name] = torch.stack([_linear(module, arguments[0], d) for d in deltas[name]])
            # What depends on the text alone has no gradient of its own: it gets one here.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return hook

    handles = [get_layer(unet, name).register_forward_hook(watch(name)) for name in deltas]
    try:
        yield outputs, moved
    finally:
        for handle in handles:
            handle.remove()


def _linear(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Returns a layer's output with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    return module._conv_forward(x, weight, None)  # with its stride, padding and groups


@contextmanager
def _frozen(*models: nn.Module) -> Iterator[None]:
    """Keeps gradients of weights from being computed, for the duration of the block."""
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
