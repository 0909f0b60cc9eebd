"""Candidates: one layer at one bit-width, all others in full precision (BitsFusion, §3.2)."""

__all__ = ["FULL_PRECISION", "Candidate", "candidates", "chosen_layers", "quantized"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bf_lib.grids import alternating_scale, fake_quantize, relative_mse
from bf_lib.layers import Layer, get_layer, list_layers


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer at one bit-width; of full precision, both are None."""

    layer: str | None
    bits: int | None

    @property
    def label(self) -> tuple[str, str]:
        """What to call its work: the kind, and the layer."""
        return ("full precision", "") if self.layer is None else (f"{self.bits} bit", self.layer)


FULL_PRECISION = Candidate(None, None)


def candidates(layers: Sequence[Layer], bits: Sequence[int]) -> list[Candidate]:
    """Lists every layer at every bit-width: 768 for SD-v1.5."""
    return [Candidate(layer.name, b) for layer in layers for b in bits]


def chosen_layers(unet: nn.Module, names: Sequence[str] | None) -> list[Layer]:
    """Returns the layers of these names, in order of execution; all that are quantized for None.

    Raises:
        ValueError: If a name is not that of a quantizable layer.
    """
    layers = list_layers(unet)
    if names is None:
        return layers
    if unknown := sorted(set(names) - {layer.name for layer in layers}):
        raise ValueError(f"the UNet has no such quantizable layers: {unknown}")
    return [layer for layer in layers if layer.name in names]


@contextmanager
def quantized(unet: nn.Module, name: str, levels: int) -> Iterator[float]:
    """Quantizes one layer for the duration of the block, then puts its weight back bit for bit.

    Arguments:
        unet: The model that the layer is of.
        name: The layer's dotted name.
        levels: The number of levels of its grid; odd, at least 3.

    Yields:
        The relative squared error of the layer's weight.

    Raises:
        ValueError: If the layer's weight cannot be quantized, or is not its own because it is
            packed or trained as a quantized one; it says which layer it is.
    """
    weight = get_layer(unet, name).weight
    if not isinstance(weight, nn.Parameter):  # it is computed, and what is written to it is lost
        raise ValueError(f"{name}: the weight is quantized already")
    kept = weight.detach().clone()
    try:
        approximation = fake_quantize(kept, alternating_scale(kept, levels), levels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        with torch.no_grad():
            weight.copy_(approximation)
        yield float(relative_mse(kept, approximation))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
