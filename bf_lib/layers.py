"""The layers of a UNet: which there are, which are quantized, in what order they run.

Conv and linear layers are addressed by their dotted module path. Those that are quantized are all
but the first and the last convolution and the layers of the time embedding, whose outputs are
pre-computed (BitsFusion, §3.2, §4.1 and App. B): 256 of 282 in SD-v1.5, with 831,201,280 of the
UNet's 859,520,964 parameters.
"""

__all__ = [
    "ENDS",
    "TIMED",
    "Layer",
    "all_layers",
    "block_of",
    "get_layer",
    "in_published_order",
    "layer_table",
    "list_layers",
    "published_bits",
]

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import pandas as pd
from torch import nn

from bf_lib.paths import ROOT

# Why layers are not quantized.
ENDS = ("first layer", "last layer")
TIMED = "its output is pre-computed"


@dataclass(frozen=True, slots=True)
class Layer:
    """A conv or linear layer of a UNet.

    `role` is what it does, such as "cross_attn.to_k" or "resnet.conv_shortcut"; for layers that
    SD-v1.5 does not have it is the last word of the name. `block` is one of "down0", ..., "mid",
    "up0", ... or, outside of the blocks, the first word of the name.
    """

    name: str
    kind: str  # "conv" or "linear"
    role: str
    block: str
    depth: int | None  # 0-based place in the forward pass among those quantized; else None
    shape: tuple[int, ...]  # of the weight
    excluded: str | None = None  # why it is not quantized

    @property
    def params(self) -> int:
        """The number of weights, without the bias."""
        return math.prod(self.shape)

    @property
    def out_channels(self) -> int:
        return self.shape[0]


def list_layers(unet: nn.Module) -> list[Layer]:
    """Lists the layers that are quantized, in the order in which the forward pass runs them."""
    return [layer for layer in all_layers(unet) if layer.excluded is None]


def all_layers(unet: nn.Module) -> list[Layer]:
    """Lists all conv and linear layers, in the order in which the forward pass runs them.

    The order follows from the names, so nothing is run and the UNet may be on the meta device; it
    is that of the blocks of SD-v1.5, SD2 and SDXL. A layer that is wrapped by adapters counts
    once, under its own name.
    """
    found = sorted(_conv_and_linear(unet), key=lambda item: _order(item[0]))
    layers: list[Layer] = []
    depth = 0
    for name, module in found:
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        excluded = _excluded(name)
        place = depth if excluded is None else None
        depth += excluded is None
        shape = _weight_shape(module)
        layers.append(Layer(name, kind, _role(name), block_of(name), place, shape, excluded))
    return layers


def layer_table(layers: Iterable[Layer]) -> pd.DataFrame:
    """Tabulates layers, one a row, with their parameters and output channels.

    Shapes are written as text, "320x4x3x3", so that the table survives CSV.
    """
    names = [field.name for field in fields(Layer)] + ["params", "out_channels"]
    rows = [[getattr(layer, name) for name in names] for layer in layers]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(shape=["x".join(map(str, shape)) for shape in table["shape"]])


def get_layer(unet: nn.Module, name: str) -> nn.Module:
    """Returns the conv or linear module of a name; of a wrapped layer, the one inside."""
    modules = dict(_conv_and_linear(unet))
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"the UNet has no conv or linear layer {name!r}{hint}")
    return modules[name]


def published_bits() -> pd.DataFrame:
    """Reads the bit-widths of SD-v1.5's layers that the paper publishes (App. H).

    Returns:
        One row a layer in the paper's order, the 256 and then `conv_in` and `conv_out`, with
        columns name, kind, cin, cout, k, params, bits ("b bits" is a grid of 2^b + 1 levels).
    """
    table = pd.read_csv(ROOT / "data" / "published_recipe.csv")
    return table.drop(columns="idx")


def in_published_order(layers: Iterable[Layer]) -> list[Layer]:
    """Sorts layers of SD-v1.5's topology as the paper does: down, up, mid; attention first."""
    rank = {name: i for i, name in enumerate(published_bits().name)}
    layers = list(layers)
    unknown = [layer.name for layer in layers if layer.name not in rank]
    if unknown:
        raise ValueError(f"the published recipe has no layer {unknown[0]!r}")
    return sorted(layers, key=lambda layer: rank[layer.name])


def _conv_and_linear(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers and their names, in order of definition."""
    wrappers: list[str] = []
    for name, module in unet.named_modules():
        if name.startswith(tuple(wrappers)):
            continue
        # PEFT keeps an adapted layer in `base_layer`, beside the adapter's own linear layers.
        inner = getattr(module, "base_layer", module)
        if isinstance(inner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if inner is not module:
                wrappers.append(name + ".")
            yield name, inner


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of the weight without touching it: it may be computed on demand."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


_EXCLUDED = (
    (re.compile(r"conv_in"), ENDS[0]),
    (re.compile(r"conv_out"), ENDS[1]),
    (re.compile(r"time_embedding\..*|.*\.time_emb_proj"), TIMED),
)


def _excluded(name: str) -> str | None:
    return next((why for pattern, why in _EXCLUDED if pattern.fullmatch(name)), None)


_ROLES = (
    (re.compile(r"\.attn1\.(to_[a-z]+)"), r"self_attn.\1"),
    (re.compile(r"\.attn2\.(to_[a-z]+)"), r"cross_attn.\1"),
    (re.compile(r"\.resnets\.\d+\.(\w+)$"), r"resnet.\1"),
    (re.compile(r"\.ff\.net\.0\.proj$"), "ff.in"),
    (re.compile(r"\.ff\.net\.2$"), "ff.out"),
    (re.compile(r"\.downsamplers\.\d+\.conv$"), "downsample"),
    (re.compile(r"\.upsamplers\.\d+\.conv$"), "upsample"),
    (re.compile(r"^(time_embedding\.\w+)$"), r"\1"),
)


def _role(name: str) -> str:
    for pattern, role in _ROLES:
        if match := pattern.search(name):
            return match.expand(role)
    words = [word for word in name.split(".") if not word.isdigit()]
    return words[-1] if words else name


_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.|(mid)_block\.")


def block_of(name: str) -> str:
    """Returns the block that a layer or parameter is in: see `Layer`."""
    match = _BLOCK.match(name)
    return "".join(filter(None, match.groups())) if match else name.split(".")[0]


# None stands for all others: embeddings of classes, sizes and pooled text.
_STAGES = ("time_embedding", None, "encoder_hid_proj", "conv_in", "down", "mid", "up", "conv_out")
_PARTS = re.compile(r"\.(resnets|attentions)\.(\d+)\.")


def _order(name: str) -> tuple[float, ...]:
    """Returns a key that sorts layers by execution; within a part they are defined in order.

    The blocks define their attentions before their resnets, but run resnet 0, attention 0, resnet
    1, and so on; the UNet defines its middle last.
    """
    match = _BLOCK.match(name)
    stage = (match[1] or match[3]) if match else name.split(".")[0]
    place = _STAGES.index(stage if stage in _STAGES else None)
    index = int(match[2] or 0) if match else 0
    part = _PARTS.search(name)
    if part is None:
        return place, index, math.inf
    return place, index, int(part[2]), part[1] == "attentions"
