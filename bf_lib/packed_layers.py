"""Convolutions and linear layers that hold their weights as packed codes.

A packed layer is of a subclass of `nn.Conv2d` or `nn.Linear`, so whatever asks for these (PEFT,
for one) finds them. Its `weight` is no parameter but is decoded when it is asked for.
"""

__all__ = [
    "Packed",
    "PackedConv2d",
    "PackedLinear",
    "Room",
    "pack_layer_",
    "packed_layers",
    "prepare_",
    "set_residency",
    "unpack_layer_",
]

import threading
from collections.abc import Callable, Collection, Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bf_lib.packed_weights import decoded_in, decoded_weight
from bf_lib.packing import word
from bf_lib.timecache import install_time_features_, unknown_features

ADVICE = "use a LoRA unfused, or call `dequantize()` first"


class Room(threading.local):
    """Where the layers of a model decode their weights one after the other.

    To ask the system for new memory for each weight takes longer than to decode it.
    """

    def __init__(self) -> None:
        self.floats = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """The bytes of the place of this thread."""
        return self.floats.nbytes

    def of(self, size: int) -> Tensor:
        """Returns a place for so many numbers, which holds until it is asked for again."""
        if len(self.floats) < size:
            self.floats = torch.empty(0)  # before there is more
            with torch.inference_mode(False):  # for either mode
                self.floats = torch.empty(size)
        return self.floats

    def __reduce__(self) -> tuple:
        """Makes the layers of a copied model share a room of their own, without its content."""
        return (Room, ())


class Decoded(Tensor):
    """A weight that stands for codes: what is written to it would be lost, and is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are ordinary tensors

    @property
    def data(self) -> Tensor:
        """The numbers, in a place of their own."""
        return self.detach().clone()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(f"packed weights cannot be overwritten: {ADVICE}")


class Packed:
    """What packed convolutions and packed linear layers have in common."""

    levels: int
    shape: tuple[int, ...]  # of the weight
    compute_dtype: torch.dtype  # that the layer computes in
    resident: bool  # whether the weight is kept once it is decoded
    room: Room  # that it shares with the other layers of its model
    words: Tensor
    scale: Tensor  # the bits of it: as floats they would be cast with the rest of a model

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
        weight = self._decoded()
        return weight if torch.compiler.is_compiling() else weight.as_subclass(Decoded)

    def _decoded(self) -> Tensor:
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

    def lent_weight(self) -> Tensor:
        """Returns the weight for one use, after which the next layer may overwrite it.

        Only where nothing can hold on to it, as autograd would, and on a CPU, whose memory is slow
        to get.
        """
        kept = self.__dict__.get("kept") is not None or self.resident
        fresh = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if kept or fresh or self.words.device.type != "cpu":
            return self._decoded()
        room = self.room.of(len(self.words) * word(self.levels).codes)
        weight = decoded_in(room, self.words, self.scale, self.levels, self.shape)
        return weight.to(self.compute_dtype)

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

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.lent_weight(), self.bias)


class PackedLinear(Packed, nn.Linear):
    """A linear layer with packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lent_weight(), self.bias)


KINDS = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}
PLAIN = {packed: plain for plain, packed in KINDS.items()}


def pack_layer_(module: nn.Module, levels: int, words: Tensor, scale: Tensor, room: Room) -> None:
    """Makes a convolution or linear layer a packed one, in place.

    Arguments:
        module: Of class `nn.Conv2d` or `nn.Linear` itself.
        levels: The number of levels of its grid.
        words: What stands for its weight, and
        scale: the bits of its scales: see `packed_weights.packed_weight`.
        room: That it shares with the other layers of its model.
    """
    kind = KINDS.get(type(module))
    if kind is None:
        raise TypeError(f"a {type(module).__name__} cannot be packed, only Conv2d and Linear")
    weight = module.weight
    del module._parameters["weight"]
    module.__class__ = kind
    module.levels, module.shape, module.compute_dtype = levels, tuple(weight.shape), weight.dtype
    module.resident, module.room = False, room
    module.register_buffer("words", words)
    module.register_buffer("scale", scale)


def prepare_(
    unet: nn.Module,
    levels: Mapping[str, int],
    timesteps: int | None,
    wide: Collection[str] = (),
) -> None:
    """Gives a UNet on the meta device the shapes of a packed one, for a checkpoint to fill.

    Arguments:
        unet: The UNet, changed in place.
        levels: The levels of each layer that is packed.
        timesteps: For how many time-steps features are cached; None keeps the time layers.
        wide: Names of the scales and time features that are stored in float32.
    """
    room, modules = Room(), dict(unet.named_modules())
    if unknown := sorted(set(levels) - set(modules)):
        raise ValueError(f"the UNet has no layers {unknown[:3]}")
    for name, count in levels.items():
        weight, unit = modules[name].weight, word(count)
        words = weight.new_empty(unit.count(weight.numel()), dtype=unit.dtype)
        bits = torch.int32 if f"{name}.scale" in wide else torch.int16
        scale = weight.new_empty(len(weight), dtype=bits)
        pack_layer_(modules[name], count, words, scale, room)
    if timesteps is not None:
        install_time_features_(unet, unknown_features(unet, timesteps, wide))


@torch.no_grad()
def unpack_layer_(module: nn.Module) -> None:
    """Makes a packed layer an ordinary one, in place, with the weight that it computes with."""
    weight = module._decoded().clone()
    for name in ("words", "scale"):
        del module._buffers[name]
    for name in ("levels", "shape", "compute_dtype", "resident", "room", "kept"):
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
            weights that may be kept; the smallest come first, since to decode one takes some time
            whatever its size.
    """
    layers = packed_layers(model)
    if residency not in ("packed", "dense") and (type(residency) is not int or residency < 0):
        raise ValueError(f"residency must be 'packed', 'dense' or bytes, got {residency!r}")
    room = {"packed": 0, "dense": float("inf")}.get(residency, residency)
    sizes = {n: prod(m.shape) * m.compute_dtype.itemsize for n, m in layers.items()}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        layer = layers[name]
        layer.resident = size <= room
        room -= size if layer.resident else 0
        if not layer.resident:
            layer.__dict__.pop("kept", None)
