"""Quantization without training of the whole: block by block, as in Q-Diffusion.

Written from the paper (Li et al., 2023, https://arxiv.org/abs/2302.04304), for weights alone: the
inputs of calibration are those of the sampler, taken evenly over its steps; block after block
learns which weights to round up and which down, so that its output on the inputs of the quantized
model so far is that of full precision (BRECQ, Li et al., 2021), by AdaRound's relaxation (Nagel et
al., 2020). Layers that read a skip connection have a scale for either part of their input (the
paper's split of shortcuts), since the two have other magnitudes.
"""

__all__ = [
    "Calibration",
    "Reconstruction",
    "Rounding",
    "calibration",
    "reconstruct",
    "shortcut_splits",
]

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bf_lib.forms import Form
from bf_lib.layers import list_layers
from bf_lib.progress import progress
from bf_lib.sampling import Sampler, denoise, encode_prompts
from bf_lib.sizes import SizeReport
from bf_lib.unbalanced import alternating_grid, minmax_grid

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)
STRETCH = (-0.1, 1.1)  # AdaRound's gamma and zeta: sigmoids reach 0 and 1 at finite values
CALIBRATED = 1_000_000  # first seed of samples: far from those that students are examined by
WEIGHT = 0.01  # of the term that makes roundings whole, as in AdaRound
SHARPNESS = (20.0, 2.0)  # its exponent, at the beginning and at the end
FREE = 0.2  # of the steps, in which it does not count yet


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a UNet is called with while it samples."""

    x: Tensor  # (n, c, h, w)
    t: Tensor  # (n,)
    text: Tensor  # (n, tokens, width)

    def __len__(self) -> int:
        return len(self.t)

    def run(self, unet: nn.Module, index: Tensor | slice) -> Tensor:
        """Returns the noise that a UNet predicts of some of it."""
        text = self.text[index]
        return unet(self.x[index], self.t[index], encoder_hidden_states=text).sample


@torch.no_grad()
def calibration(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    sampler: Sampler,
    count: int,
    seed: int = 0,
) -> Calibration:
    """Draws prompts and keeps what the UNet is called with, as often at each step.

    Arguments:
        pipe: The pipeline.
        prompts: What to draw; other than those that images are judged by.
        sampler: How.
        count: How many inputs to keep.
        seed: Of the samples, and of which inputs are kept.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        x, t = args
        calls.append((x, t.expand(len(x)), kwargs["encoder_hidden_states"]))

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        seeds = [CALIBRATED + seed * len(prompts) + i for i in range(len(prompts))]
        embeds = encode_prompts(pipe, prompts)
        for i in range(0, len(prompts), sampler.batch):
            part = slice(i, i + sampler.batch)
            denoise(pipe, embeds[part], seeds[part], sampler)
    finally:
        hook.remove()
    x, t, text = (torch.cat(parts).clone() for parts in zip(*calls, strict=True))
    generator = torch.Generator().manual_seed(seed)
    steps = t.unique()
    each = [(t == step).nonzero().flatten() for step in steps]
    kept = torch.cat(
        [
            found[torch.randperm(len(found), generator=generator)[: -(-count // len(steps))]]
            for found in each
        ]
    )
    kept = kept[torch.randperm(len(kept), generator=generator)]  # each batch has several steps
    return Calibration(x[kept], t[kept], text[kept])


class Rounding(nn.Module):
    """A parametrization: weights rounded up or down, as far as that is learnt.

    Arguments:
        weight: The weight, with shape (out, in, *).
        bits: The number of bits of the codes.
        split: How many of its inputs have a scale of their own; None if all share one.
    """

    def __init__(self, weight: Tensor, bits: int, split: int | None = None) -> None:
        super().__init__()
        scale, zero = torch.empty_like(weight), torch.empty_like(weight)
        for part in [slice(None)] if split is None else [slice(split), slice(split, None)]:
            piece = weight[:, part]
            grid = alternating_grid(piece, bits, minmax_grid(piece, bits))
            scale[:, part] = grid.scale.half().to(weight.dtype)
            zero[:, part] = grid.zero
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("low", -zero, persistent=False)
        self.register_buffer("high", 2**bits - 1 - zero, persistent=False)
        ratio = weight / scale
        self.register_buffer("floor", ratio.floor(), persistent=False)
        rest = (ratio - self.floor).clamp(1e-3, 1 - 1e-3)
        first, last = STRETCH
        self.logits = nn.Parameter(torch.logit((rest - first) / (last - first)))
        self.whole = False  # whether roundings are those that were decided

    @property
    def up(self) -> Tensor:
        """How far each weight is rounded up, from 0 to 1."""
        first, last = STRETCH
        return (self.logits.sigmoid() * (last - first) + first).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the rounded weight; what it is given does not matter any more."""
        up = (self.up >= 0.5).to(weight.dtype) if self.whole else self.up
        return (self.floor + up).clamp(self.low, self.high) * self.scale

    def undecided(self, sharpness: float) -> Tensor:
        """Returns AdaRound's regularizer: 0 where all is rounded up or down."""
        return (1 - (2 * self.up - 1).abs() ** sharpness).sum()


def reconstruct(
    unet: UNet2DConditionModel,
    inputs: Calibration,
    bits: int = 4,
    steps: int = 200,
    batch: int = 16,
    lr: float = 3e-2,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> UNet2DConditionModel:
    """Returns a copy of a UNet, quantized block by block.

    Blocks are residual blocks and transformer blocks; layers outside of these are one each. The
    first and last convolution and the time layers stay as they are.

    Arguments:
        unet: The UNet, which stays as it is.
        inputs: Of calibration.
        bits: Of the codes.
        steps: Of each block.
        batch: Samples of a step.
        lr: The rate of its roundings.
        seed: Of the order of samples.
        only: The names of the blocks to be quantized; None is all of them.
    """
    student = copy.deepcopy(unet).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    splits = shortcut_splits(unet)
    blocks = [(name, layers) for name, layers in _blocks(unet) if only is None or name in only]
    for name, layers in progress(blocks, desc="blocks"):
        wanted = [out for _, out in _calls(unet, name, inputs, batch)]
        given = [call for call, _ in _calls(student, name, inputs, batch)]
        roundings = []
        for layer in layers:
            module = student.get_submodule(layer)
            roundings.append(Rounding(module.weight, bits, splits.get(layer)))
            parametrize.register_parametrization(module, "weight", roundings[-1])
        _learn(student.get_submodule(name), roundings, given, wanted, steps, lr, generator)
    return student


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A form of the ablation that is not trained as a whole: how its blocks are learnt."""

    bits: int = 4
    inputs: int = 256  # of calibration
    steps: int = 200  # of each block
    batch: int = 16
    lr: float = 3e-2  # so that in so many steps every rounding can be decided

    def __call__(
        self,
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        sampler: Sampler,
        seed: int,
    ) -> UNet2DConditionModel:
        """Returns the quantized UNet of a pipeline, calibrated on prompts."""
        inputs = calibration(pipe, prompts, sampler, self.inputs, seed)
        return reconstruct(pipe.unet, inputs, self.bits, self.steps, self.batch, self.lr, seed)

    def size(self, unet: UNet2DConditionModel, timesteps: int) -> SizeReport:
        """Returns what is stored of it: codes of b bits, and scales and zero-points of each part.

        Arguments:
            unet: The original.
            timesteps: How many time-steps' features are stored; instead of the time layers,
                which are left as they are, that computes the same.
        """
        report = Form(kind="plain", bits=self.bits).size(unet, timesteps)
        parts = report.parts.copy()
        split = parts.name.isin([f"{name}.scale" for name in shortcut_splits(unet)])
        parts.loc[split, ["count", "stored_bytes"]] *= 2
        return replace(report, parts=parts)


def shortcut_splits(unet: UNet2DConditionModel) -> dict[str, int]:
    """Returns how many inputs of a layer come from below, for layers that also read a skip."""
    found = {}
    for i, block in enumerate(unet.up_blocks):
        below = unet.mid_block if i == 0 else unet.up_blocks[i - 1]
        width = below.resnets[-1].out_channels
        for j, resnet in enumerate(block.resnets):
            for part in ("conv1", "conv_shortcut"):
                found[f"up_blocks.{i}.resnets.{j}.{part}"] = width
            width = resnet.out_channels
    return found


def _blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, list[str]]]:
    """Yields the names of blocks and of the layers in each, in the order in which they run."""
    kinds = dict(unet.named_modules())

    def owner(layer: str) -> str:
        parts = layer.split(".")
        above = [".".join(parts[:n]) for n in range(1, len(parts))]
        return next((name for name in above if isinstance(kinds[name], BLOCKS)), layer)

    layers = sorted(list_layers(unet), key=lambda layer: layer.depth)
    for name, group in groupby((layer.name for layer in layers), owner):
        yield name, list(group)


Call = tuple[tuple, dict]  # arguments of a module


class _Seen(Exception):  # noqa: N818 - it is no error
    """Ends a forward pass early."""


@torch.no_grad()
def _calls(
    unet: UNet2DConditionModel, name: str, inputs: Calibration, batch: int
) -> list[tuple[Call, Tensor]]:
    """Returns what a module is called with, and what it returns, batch by batch."""
    seen: list[tuple[Call, Tensor]] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        seen.append(((args, kwargs), out))
        raise _Seen  # what comes after the module is not needed

    hook = unet.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    try:
        for start in range(0, len(inputs), batch):
            with suppress(_Seen):
                inputs.run(unet, slice(start, start + batch))
    finally:
        hook.remove()
    return seen


def _learn(
    block: nn.Module,
    roundings: Sequence[Rounding],
    given: Sequence[Call],
    wanted: Sequence[Tensor],
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    """Learns the roundings of a block, and makes them whole."""
    optimizer = torch.optim.Adam([rounding.logits for rounding in roundings], lr)
    first, last = SHARPNESS
    for step in range(steps):
        index = int(torch.randint(len(given), (), generator=generator))
        args, kwargs = given[index]
        loss = (block(*args, **kwargs) - wanted[index]).square().sum(dim=1).mean()
        done = step / steps
        if done >= FREE:
            sharpness = first + (last - first) * (done - FREE) / (1 - FREE)
            loss = loss + WEIGHT * sum(rounding.undecided(sharpness) for rounding in roundings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for rounding in roundings:
        rounding.whole = True
        rounding.requires_grad_(False)
