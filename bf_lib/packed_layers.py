"""Convolutions and linear layers that hold their weights as packed codes.

A packed layer is of a subclass of `nn.Conv2d` or `nn.Linear`, so whatever asks for these (PEFT,
for one) finds them. Its `weight` is no parameter but is decoded when it is asked for:

    weight = code * scale,

in float32, and then in the type that the layer computes in, so that it is bit for bit what
`grids.fake_quantize` makes of the same codes and scale.
"""

__all__ = [
    "Packed",
    "PackedConv2d",
    "PackedLinear",
    "decoded_weight",
    "half_scale",
    "pack_layer_",
    "packed_layers",
    "packed_weight",
    "prepare_",
    "set_residency",
    "unpack_layer_",
]

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

from bf_lib.grids import quantize
from bf_lib.packing import pack, unpack, word
from bf_lib.timecache import install_time_features_, unknown_features

CHUNK = 1 << 18  # weights at once, in float32: what stays in the cache


def decoded_weight(
    words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Returns the weight that words and scales stand for.

    Arguments:
        words: As `packing.pack` returns them.
        scale: The bits of the float16 scale of each output channel, with shape (out,), int16.
        levels: The number of levels.
        shape: The shape of the weight, (out, *).
        dtype: Its type.
    """
    return torch.ops.bf_lib.decoded_weight(words, scale, levels, shape, dtype)


# As an operator of its own, a compiler takes it for one step and does not look into it.
@torch.library.custom_op("bf_lib::decoded_weight", mutates_args=())
def _decoded(
    words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    codes = unpack(words, levels, prod(shape)).view(shape[0], -1)
    factor = scale.view(torch.float16).to(torch.float32)[:, None]
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    size = max(1, CHUNK // codes.shape[1])
    for start in range(0, len(codes), size):
        rows = slice(start, start + size)
        weight[rows] = codes[rows].to(torch.float32).mul_(factor[rows])
    return weight.view(shape)


@_decoded.register_fake
def _(words: Tensor, scale: Tensor, levels: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return words.new_empty(shape, dtype=dtype)


class Packed:
    """What packed convolutions and packed linear layers have in common."""

    levels: int
    shape: tuple[int, ...]  # of the weight
    compute_dtype: torch.dtype  # that the layer computes in
    resident: bool  # whether the weight is kept once it is decoded
    words: Tensor
    scale: Tensor  # int16: as floats they would be cast with the rest of a model

    def __new__(cls, *args: object, **kwargs: object) -> nn.Module:
        """Makes an ordinary layer: PEFT builds a LoRA's own layers of the class it finds.

        A packed layer is not built but becomes one (`pack_layer_`), or is copied, without
        arguments.
        """
        if args or kwargs:
            return PLAIN[cls](*args, **kwargs)
        return super().__new__(cls)

    @property
    def weight(self) -> Tensor:
        """The weight with shape (out, *), in the type that the layer computes in."""
        kept = self.__dict__.get("kept")
        if kept is not None:
            return kept
        # Not one of inference mode, which no later training could use.
        with torch.inference_mode(False):
            how = (self.levels, list(self.shape), self.compute_dtype)
            weight = decoded_weight(self.words, self.scale, *how)
        if self.resident and weight.device.type != "meta":
            self.__dict__["kept"] = weight
        return weight

    def _load_from_state_dict(self, *args: object) -> None:
        """Takes other words and scales, and forgets the weight that was decoded of these."""
        self.__dict__.pop("kept", None)
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follows `.to(device)` and casts: words and scales are moved, and the type changes."""
        self.__dict__.pop("kept", None)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution with packed weights."""


class PackedLinear(Packed, nn.Linear):
    """A linear layer with packed weights."""


KINDS = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}
PLAIN = {packed: plain for plain, packed in KINDS.items()}


def half_scale(scale: Tensor) -> Tensor:
    """Rounds scales to positive values of float16, in their own type."""
    tiny, most = torch.finfo(torch.float16).smallest_normal / 1024, torch.finfo(torch.float16).max
    return scale.clamp(tiny, most).to(torch.float16).to(scale.dtype)


@torch.no_grad()
def packed_weight(weight: Tensor, levels: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight to a grid, and returns what a packed layer holds of it.

    Arguments:
        weight: The weight, with shape (out, *).
        levels: The number of levels; odd, at least 3.
        scale: The scale of each output channel, with shape (out, 1, ...), of values of float16
            (`half_scale`).

    Returns:
        The words, and the bits of the scales with shape (out,), int16.
    """
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        raise ValueError("scales must be values of float16, as `half_scale` makes them")
    codes = quantize(weight, scale.float(), levels).codes
    return pack(codes, levels), half.flatten().view(torch.int16).clone()


def pack_layer_(module: nn.Module, levels: int, words: Tensor, scale: Tensor) -> None:
    """Makes a convolution or linear layer a packed one, in place.

    Arguments:
        module: Of class `nn.Conv2d` or `nn.Linear` itself.
        levels: The number of levels of its grid.
        words: What stands for its weight, and
        scale: the bits of its scales: see `packed_weight`.
    """
    kind = KINDS.get(type(module))
    if kind is None:
        raise TypeError(f"a {type(module).__name__} cannot be packed, only Conv2d and Linear")
    weight = module.weight
    del module._parameters["weight"]
    module.__class__ = kind
    module.levels, module.shape, module.compute_dtype = levels, tuple(weight.shape), weight.dtype
    module.resident = False
    module.register_buffer("words", words)
    module.register_buffer("scale", scale)


def prepare_(unet: nn.Module, levels: Mapping[str, int], timesteps: int | None) -> None:
    """Gives a UNet on the meta device the shapes of a packed one, for a checkpoint to fill.

    Arguments:
        unet: The UNet, changed in place.
        levels: The levels of each layer that is packed.
        timesteps: For how many time-steps features are cached; None keeps the time layers.
    """
    modules = dict(unet.named_modules())
    if unknown := sorted(set(levels) - set(modules)):
        raise ValueError(f"the UNet has no layers {unknown[:3]}")
    for name, count in levels.items():
        weight, unit = modules[name].weight, word(count)
        words = weight.new_empty(-(-weight.numel() // unit.codes), dtype=unit.dtype)
        scale = weight.new_empty(len(weight), dtype=torch.int16)
        pack_layer_(modules[name], count, words, scale)
    if timesteps is not None:
        install_time_features_(unet, unknown_features(unet, timesteps))


@torch.no_grad()
def unpack_layer_(module: nn.Module) -> None:
    """Makes a packed layer an ordinary one, in place, with the weight that it computes with."""
    weight = module.weight.clone()
    for name in ("words", "scale"):
        del module._buffers[name]
    for name in ("levels", "shape", "compute_dtype", "resident", "kept"):
        module.__dict__.pop(name, None)
    module.__class__ = PLAIN[type(module)]
    module.weight = nn.Parameter(weight, requires_grad=False)


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the packed layers of a model, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def set_residency(model: nn.Module, residency: str | int) -> None:
    """Says which packed layers keep their weight once it is decoded.

    Arguments:
        model: A model with packed layers.
        residency: "packed" decodes a weight whenever it is used: the least memory. "dense" keeps
            all: the least time, and the memory of the original. A number is the most bytes of
            weights that may be kept; those that take longest to decode for their size come first.
    """
    layers = packed_layers(model)
    if residency not in ("packed", "dense") and (type(residency) is not int or residency < 0):
        raise ValueError(f"residency must be 'packed', 'dense' or bytes, got {residency!r}")
    room = {"packed": 0, "dense": float("inf")}.get(residency, residency)
    for layer in sorted(
        layers.values(), key=lambda layer: (-word(layer.levels).codes, layer.levels)
    ):
        size = prod(layer.shape) * layer.compute_dtype.itemsize
        layer.resident = size <= room
        room -= size if layer.resident else 0
        if not layer.resident:
            layer.__dict__.pop("kept", None)
