"""How other systems store a UNet in low bits, each by its own means, and we by ours.

A peer says how a UNet in float32 goes to files and comes back from them. Whatever a system leaves
as it is, is stored in half precision; each computes in float32 once it is loaded, so that all are
held against the same full model. Packages of others are optional (`pip install "bf_lib[peers]"`),
and only called.

Some systems have nothing that runs a UNet of diffusers from their files: GGUF files and palettes
are decoded on load into an ordinary UNet, and so is half precision.
"""

__all__ = [
    "Peer",
    "all_peers",
    "gguf",
    "half_precision",
    "installed",
    "ours",
    "palettes",
    "quanto",
    "sdnq",
    "torchao",
]

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import TorchAoConfig, UNet2DConditionModel
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, SDNQConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from bf_lib.decoded_files import load_gguf, load_palettes, store_gguf, store_palettes
from bf_lib.models import meta_unet
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import load_packed, pack_
from bf_lib.recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers calls them
QUANTO_MAP = "quantization_map.json"
TIMESTEPS = Sequence[float] | Tensor | None


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to store a UNet. Its functions are sent to other processes, so modules have them."""

    name: str
    store: Callable[[UNet2DConditionModel, Path], None]  # may change the UNet
    load: Callable[[Path], UNet2DConditionModel]
    package: str | None = None  # that it needs, as it is imported
    decoded: bool = False  # on load, into an ordinary UNet


def installed(peer: Peer) -> bool:
    """Returns whether the package that a peer needs is there."""
    try:
        return peer.package is None or find_spec(peer.package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def all_peers(recipe: Recipe, timesteps: TIMESTEPS = None) -> list[Peer]:
    """Lists all peers, and our two tiers last.

    Arguments:
        recipe: The levels of our layers.
        timesteps: Whose features we cache; None keeps the time layers.
    """
    return [
        half_precision(),
        *(quanto(bits) for bits in (4, 2)),
        *(sdnq(bits, size) for size in (0, -1) for bits in (4, 3, 2)),
        torchao("int4"),
        *(torchao("intx", bits) for bits in (4, 2)),
        palettes(),
        *(gguf(kind, whole) for whole in (False, True) for kind in ("TQ1_0", "TQ2_0")),
        *(ours(recipe, compress, timesteps) for compress in (None, "zstd")),
    ]


# ---- half precision, and what diffusers loads by itself


def half_precision() -> Peer:
    """Returns float16 as diffusers saves it."""
    return Peer("fp16", _store_half, _load_with_diffusers, decoded=True)


def _store_half(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.half().save_pretrained(folder)


def _load_with_diffusers(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)


def _store_with_diffusers(
    unet: UNet2DConditionModel, folder: Path, config: QuantizationConfigMixin
) -> None:
    """Lets diffusers quantize a UNet while it loads it, and saves what comes of it."""
    with TemporaryDirectory(dir=folder.parent) as half:
        _store_half(unet, Path(half))
        kind = {"torch_dtype": torch.float16, "quantization_config": config}
        UNet2DConditionModel.from_pretrained(half, **kind).save_pretrained(folder)


# ---- packages


def quanto(bits: int) -> Peer:
    """Returns quanto's weights of 2 or 4 bits, convolutions among them, in groups of 128."""
    store = partial(_store_quanto, kind=f"qint{bits}")
    return Peer(f"quanto qint{bits}", store, _load_quanto, "optimum.quanto")


def _store_quanto(unet: UNet2DConditionModel, folder: Path, kind: str) -> None:
    """Calls quantize and freeze; saves the state and, as quanto's guide does, the map beside."""
    from optimum.quanto import freeze, quantization_map, quantize

    quantize(unet.half(), weights=kind)
    freeze(unet)
    unet.save_config(folder)
    save_file(unet.state_dict(), folder / WEIGHTS)
    (folder / QUANTO_MAP).write_text(json.dumps(quantization_map(unet)))


def _load_quanto(folder: Path) -> UNet2DConditionModel:
    """Calls requantize; scales become float32 before, for the UNet to compute in that."""
    from optimum.quanto import requantize

    unet = meta_unet(UNet2DConditionModel.load_config(folder))
    stored = load_file(folder / WEIGHTS)
    state = {n: v.float() if v.is_floating_point() else v for n, v in stored.items()}
    requantize(unet, state, json.loads((folder / QUANTO_MAP).read_text()), torch.device("cpu"))
    return unet.eval()


def sdnq(bits: int, group_size: int = 0) -> Peer:
    """Returns SDNQ's unsigned weights, convolutions among them.

    It leaves layers of less than 16384 weights or 32 channels as they are, and what it runs is
    compiled at the first step.

    Arguments:
        bits: Of a weight.
        group_size: 0 for its own choice, -1 for a scale a channel.
    """
    store = partial(_store_sdnq, kind=f"uint{bits}", group_size=group_size)
    name = f"SDNQ uint{bits}" + (" per channel" if group_size == -1 else "")
    return Peer(name, store, _load_with_diffusers, "sdnq")


def _store_sdnq(unet: UNet2DConditionModel, folder: Path, kind: str, group_size: int) -> None:
    """Calls diffusers with its SDNQConfig, which is that of the package."""
    config = SDNQConfig(weights_dtype=kind, group_size=group_size, quant_conv=True)
    _store_with_diffusers(unet, folder, config)


def torchao(kind: str, bits: int = 4) -> Peer:
    """Returns torchao's quantization of weights alone, which is one of linear layers.

    Arguments:
        kind: "int4", in groups of 128, which needs kernels that torchao does not bring along, or
            "intx", with a scale a channel.
        bits: Of "intx".
    """
    name = "torchao int4" if kind == "int4" else f"torchao intx int{bits}"
    store = partial(_store_torchao, kind=kind, bits=bits)
    return Peer(name, store, _load_with_diffusers, "torchao")


def _store_torchao(unet: UNet2DConditionModel, folder: Path, kind: str, bits: int) -> None:
    """Calls diffusers with its TorchAoConfig of Int4WeightOnlyConfig or IntxWeightOnlyConfig."""
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig

    number = getattr(torch, f"int{bits}")
    config = Int4WeightOnlyConfig() if kind == "int4" else IntxWeightOnlyConfig(number)
    _store_with_diffusers(unet, folder, TorchAoConfig(config))


def gguf(kind: str, rearranged: bool = False) -> Peer:
    """Returns a GGUF file with weights of three values, as the package `gguf` rounds them.

    A block has 256 weights of one row of a tensor's last dimension. That of a convolution is its
    kernel's width, so none of them fits; converters for Stable Diffusion therefore rearrange a
    tensor into rows of 256 where the number of its weights allows it.

    Arguments:
        kind: "TQ1_0" or "TQ2_0".
        rearranged: Whether tensors are.
    """
    store = partial(store_gguf, kind=kind, rearranged=rearranged)
    name = f"GGUF {kind}" + (" rearranged" if rearranged else "")
    return Peer(name, store, load_gguf, "gguf", decoded=True)


# ---- palettes


def palettes() -> Peer:
    """Returns palettes of 2 bits, Apple's scheme for Core ML.

    The weights of a conv or linear layer are indices into a table of four float16 values, which
    k-means finds; four indices share a byte.
    """
    return Peer("palettes, 2 bits", store_palettes, load_palettes, decoded=True)


# ---- ours


def ours(recipe: Recipe, compress: str | None = None, timesteps: TIMESTEPS = None) -> Peer:
    """Returns our packed format.

    Arguments:
        recipe: The levels of the layers.
        compress: None, or "zstd" for entropy-coded words.
        timesteps: Whose features are cached; None keeps the time layers.
    """
    steps = None if timesteps is None else [float(t) for t in timesteps]
    store = partial(_store_ours, levels=dict(recipe.levels), compress=compress, timesteps=steps)
    return Peer(f"bf_lib {compress or 'packed'}", store, load_packed)


def _store_ours(
    unet: UNet2DConditionModel,
    folder: Path,
    levels: dict[str, int],
    compress: str | None,
    timesteps: list[float] | None,
) -> None:
    pack_(unet, BitsFusionConfig(levels, timesteps=timesteps, compress=compress))
    unet.save_pretrained(folder)
