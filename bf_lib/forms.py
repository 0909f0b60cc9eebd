"""The forms in which students of the ablation start: the paper's, and those beside it.

- "balanced": grids of 2^b + 1 levels, by a recipe (BitsFusion, §4.1);
- "plain": grids of 2^b levels with a whole zero-point for each channel (Eq. 1), trained with the
  gradients of LSQ (the paper's QAT-Base);
- "half-shifted": 2^b levels symmetric about zero, with none at zero;
- "lora": plain grids of a frozen weight plus a trained product of low rank, of which only that and
  the scales are trained, in the manner of EfficientDM (He et al., 2023,
  https://arxiv.org/abs/2310.03270). That trains along the teacher's own sampling without images,
  with a rank of 32 and rates in proportion to each layer's step; this, on what all rows see, with
  one rate for all layers;
- "palette": 2^b values for each layer, found by k-means (Apple's scheme), of which the values are
  trained and the indices are not;
- "full": full precision, for what training alone does.

The first and last convolution stay as they are in all of them.
"""

__all__ = ["KINDS", "Form", "Palette", "SumOfLowRank", "as_stored"]

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bf_lib.decoded_files import palette_of
from bf_lib.fakequant import FakeQuantized, bake_weights_
from bf_lib.layers import list_layers
from bf_lib.packed_weights import SCALES
from bf_lib.recipe import Recipe
from bf_lib.sizes import SizeReport, size_report
from bf_lib.student import TRAINED_AT, quantize, with_parametrized_weights
from bf_lib.timecache import (
    cache_time_features_,
    cached_time_features,
    install_time_features_,
)
from bf_lib.unbalanced import UnbalancedGrid, alternating_grid, minmax_grid, shifted_grid

KINDS = ("balanced", "plain", "half-shifted", "lora", "palette", "full")
TABLE_BITS = 16  # of a value of a palette, and of a scale


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a student starts from its teacher. It is called with the teacher's UNet."""

    kind: str = "balanced"
    levels: tuple[tuple[str, int], ...] = ()  # of each layer, for balanced grids
    bits: int = 2  # of the others
    scales: str = "alternating"  # or "minmax" or, for balanced grids, "optimal"
    cached: bool = True  # whether time features are
    rank: int = 8  # of "lora"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if (self.kind == "balanced") != bool(self.levels):
            raise ValueError(f"balanced grids have levels, and no others have; got {self.kind!r}")
        known = SCALES if self.kind == "balanced" else ("alternating", "minmax")
        if self.scales not in known:
            raise ValueError(f"scales must be one of {sorted(known)}, got {self.scales!r}")

    def __call__(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """Returns the student of a UNet, which stays as it is."""
        times = TRAINED_AT if self.cached else None
        if self.kind == "balanced":
            return quantize(unet, dict(self.levels), times, self.scales)
        if self.kind == "full":
            student = copy.deepcopy(unet).float().requires_grad_(True)
            if self.cached:
                cache_time_features_(student, TRAINED_AT)
            return student
        names = [layer.name for layer in list_layers(unet)]
        student = with_parametrized_weights(unet, names, self._parametrization, times)
        if self.kind in ("lora", "palette"):
            for name in names:
                parametrizations = student.get_submodule(name).parametrizations
                parametrizations.weight.original.requires_grad_(False)
        if self.kind == "lora":
            added = ("down", "up", "log_scale")
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name.endswith(added))
        return student

    def _parametrization(self, name: str, weight: Tensor) -> nn.Module:
        if self.kind == "palette":
            return Palette(weight, self.bits)
        start = shifted_grid if self.kind == "half-shifted" else minmax_grid
        grid = start(weight, self.bits)
        if self.scales == "alternating":
            grid = alternating_grid(weight, self.bits, grid)
        rounded = _rounded(grid, self.bits)
        return SumOfLowRank(weight, rounded, self.rank) if self.kind == "lora" else rounded

    def size(self, unet: UNet2DConditionModel, timesteps: int) -> SizeReport:
        """Returns what is stored of such a student; for balanced grids, of its file to the byte.

        For the others, codes are counted at b bits, and what else they need at 16 or b.

        Arguments:
            unet: The original.
            timesteps: How many time-steps' features are stored, if they are cached.
        """
        steps = timesteps if self.cached else None
        if self.kind == "balanced":
            return size_report(unet, Recipe(dict(self.levels)), steps)
        if self.kind == "full":
            return size_report(unet, None, steps)
        ternary = Recipe({layer.name: 3 for layer in list_layers(unet)})
        report = size_report(unet, ternary, steps)
        parts = report.parts.copy()
        codes, scales = parts.kind == "codes", parts.kind == "scales"
        parts.loc[codes, "ideal_bits"] = float(self.bits)
        parts.loc[codes, "stored_bytes"] = (parts["count"][codes] * self.bits + 7) // 8
        if self.kind == "palette":
            parts.loc[scales, "count"] = 2**self.bits
        each = TABLE_BITS + (self.bits if self.kind in ("plain", "lora") else 0)  # zero-points
        parts.loc[scales, "stored_bytes"] = (parts["count"][scales] * each + 7) // 8
        return replace(report, parts=parts)


def _rounded(grid: UnbalancedGrid, bits: int) -> FakeQuantized:
    shift = float(grid.zero.flatten()[0] % 1)
    return FakeQuantized(grid.scale, -grid.zero, 2**bits - 1 - grid.zero, shift)


class SumOfLowRank(nn.Module):
    """A parametrization: a weight plus a product of low rank, rounded together."""

    def __init__(self, weight: Tensor, rounded: FakeQuantized, rank: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        self.rounded = rounded
        start = torch.randn(rank, flat.shape[1]) / flat.shape[1] ** 0.5
        self.down = nn.Parameter(start.to(flat.device))
        self.up = nn.Parameter(flat.new_zeros(len(flat), rank))  # the sum starts as the weight

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the rounded weight, with shape (out, *)."""
        return self.rounded(weight + (self.up @ self.down).view_as(weight))


class Palette(nn.Module):
    """A parametrization: each weight is one of a few values, which are trained."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        values, indices = palette_of(weight.cpu(), 2**bits)
        self.values = nn.Parameter(values.to(weight))
        self.register_buffer("indices", indices.int().to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the values, in float16 as they are stored, with the shape of the weight."""
        stored = self.values + (self.values.half().to(self.values.dtype) - self.values).detach()
        return stored[self.indices]


@torch.no_grad()
def as_stored(student: UNet2DConditionModel, steps: Tensor) -> UNet2DConditionModel:
    """Makes a student an ordinary UNet, in place, with all numbers as they are stored.

    Arguments:
        student: A student of any form.
        steps: The time-steps whose features are kept, if they are cached.
    """
    coded = {
        f"{name}.weight"
        for name, layer in student.named_modules()
        if hasattr(layer, "parametrizations")
    }
    bake_weights_(student)
    known = cached_time_features(student)
    if known is not None:
        install_time_features_(student, known.at(steps))
    for name, value in student.named_parameters():
        if name not in coded:
            value.copy_(value.half())
    return student.requires_grad_(False).eval()
