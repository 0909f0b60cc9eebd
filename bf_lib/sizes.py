"""What a quantized UNet weighs: the paper's accounting, and the bytes of a file.

Two kinds of bits, never one without the other:

- *paper bits* (App. H), (sum_i log2(L_i) N_i + 16 N_tf) / N_w: codes at their entropy bound, if
  all levels were equally frequent; N_tf cached time features at 16 bits; over N_w, the weights of
  all conv and linear layers of the original UNet, with those of the time layers that are removed.
  Scales, biases and norms are not counted.
- *stored bits*: 8 times the bytes on disk, of everything, over all parameters of the original.

Codes are stored as `bf_lib.packing` packs them; scales, biases, norms and what is not quantized
as float16; and the header of a safetensors file as what it is, JSON that says of each tensor what
it is and where (FORMAT.md). The bytes are computed from the shapes, for a file that need not have
been written, and are those of the file if it is.
"""

__all__ = ["SizeReport", "meta_unet_of", "size_report"]

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pandas as pd
from diffusers import UNet2DConditionModel
from torch import nn

from bf_lib.checkpoint import STORED_AS, Header, left_out
from bf_lib.grids import bits_of_levels
from bf_lib.layers import ENDS, TIMED, Layer, all_layers, block_of
from bf_lib.models import MODELS, meta_unet, sd15_unet_config
from bf_lib.packed_layers import Packed
from bf_lib.packing import word
from bf_lib.recipe import Recipe

# The paper keeps "all other parameters as 32 bits" (App. H), and counts features at 16.
FEATURE_BITS, OTHER_BITS = 16, 32
HALF = 2  # bytes of a float16
# Types as safetensors calls them, and their bytes; in a file, the last of these come first.
BYTES = {"U8": 1, "I16": 2, "F16": 2, "I32": 4, "I64": 8}
COLUMNS = ("name", "block", "kind", "count", "ideal_bits", "counted", "dtype", "shape")
KINDS = (
    "codes",
    "scales",
    "biases and norms",
    "time features",
    "first and last layer",
    "weights left as they are",
    "metadata",
)


@dataclass(frozen=True, slots=True, eq=False)
class SizeReport:
    """The size of a quantized UNet, part by part.

    `parts` has a row for each tensor of the file, with columns name, block, kind, count (how many
    numbers), ideal_bits (of one, in the paper's accounting), counted (whether the paper's average
    counts it), dtype and shape (as safetensors has them) and stored_bytes.
    """

    parts: pd.DataFrame
    parameters: int  # of the original UNet, all
    weights: int  # of its conv and linear layers: N_w
    removed: int  # of these, those of the time layers, if time features are stored instead

    @property
    def paper_bits(self) -> float:
        """The paper's average: 1.9885 for its own recipe."""
        return self._counted() / self.weights

    @property
    def bits_of_what_is_left(self) -> float:
        """The same over the weights that are still there: 2.0551 for the paper's recipe."""
        return self._counted() / (self.weights - self.removed)

    @property
    def bits_of_inner_layers(self) -> float:
        """The average over quantized layers but the first and the last: 2.0355 for the paper's."""
        codes = self.parts[self.parts.kind == "codes"]
        return float((codes.ideal_bits * codes["count"]).sum() / codes["count"].sum())

    @property
    def stored_bytes(self) -> int:
        """The bytes of the file."""
        return int(self.parts.stored_bytes.sum())

    @property
    def stored_bits(self) -> float:
        """The bits of the file for each parameter of the original UNet."""
        return 8 * self.stored_bytes / self.parameters

    @property
    def ideal_bytes(self) -> float:
        """The paper's size: codes at log2(L) bits, features at 16, all else at 32, no metadata."""
        return float((self.parts.ideal_bits * self.parts["count"]).sum() / 8)

    @property
    def half_bytes(self) -> int:
        """The size of the original in float16."""
        return HALF * self.parameters

    def by(self, column: str) -> pd.DataFrame:
        """Sums the parts by kind or by block.

        Returns:
            Columns count, ideal_bytes and stored_bytes, in the order of `KINDS`, or of the blocks.
        """
        parts = self.parts.assign(ideal_bytes=self.parts.ideal_bits * self.parts["count"] / 8)
        columns = ["count", "ideal_bytes", "stored_bytes"]
        sums = parts.groupby(column, sort=False)[columns].sum()
        return sums.reindex([k for k in KINDS if k in sums.index]) if column == "kind" else sums

    def _counted(self) -> float:
        """Returns the bits that the paper counts: codes and time features."""
        counted = self.parts[self.parts.counted]
        return float((counted.ideal_bits * counted["count"]).sum())


def size_report(
    unet: nn.Module | str | Path, recipe: Recipe | None = None, timesteps: int | None = 50
) -> SizeReport:
    """Reports what a UNet weighs when it is quantized by a recipe.

    Arguments:
        unet: The original UNet, which may be on the meta device; or the name, folder or hub id of
            a pipeline or a UNet, of which only the configuration is read.
        recipe: The levels of its layers; None keeps all of them in float16.
        timesteps: How many time-steps' features are stored in place of the time layers, 50 or
            less in the paper; None keeps the time layers, in float16.

    Raises:
        RecipeError: If the recipe is not one for this UNet.
        ValueError: If the UNet is packed already, or there are to be no time-steps.
    """
    if not isinstance(unet, nn.Module):
        unet = meta_unet_of(unet)
    if any(isinstance(module, Packed) for module in unet.modules()):
        raise ValueError("this UNet is packed: a report is of the original one")
    if recipe is not None:
        recipe.check(unet)
    if timesteps is not None and timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, or None, got {timesteps}")
    levels = {} if recipe is None else recipe.levels
    layers = all_layers(unet)
    parts = pd.DataFrame(_parts(unet, layers, levels, timesteps), columns=COLUMNS)
    parts["stored_bytes"] = [
        BYTES[kind] * prod(map(int, shape.split("x")))
        for kind, shape in zip(parts.dtype, parts["shape"], strict=True)
    ]
    header = None
    if recipe is not None:
        made = dict(recipe.made) | {"scales": "alternating"}
        left = left_out(layers, levels, timesteps is not None)
        header = Header(levels=dict(levels), left=left, timesteps=timesteps, made=made)
    size = header_bytes(parts, header)
    parts.loc[len(parts)] = "header", "file", "metadata", 0, 0.0, False, "U8", str(size), size
    return SizeReport(
        parts=parts,
        parameters=sum(parameter.numel() for parameter in unet.parameters()),
        weights=sum(layer.params for layer in layers),
        removed=sum(layer.params for layer in layers if timesteps and layer.excluded == TIMED),
    )


def _parts(
    unet: nn.Module, layers: list[Layer], levels: Mapping[str, int], timesteps: int | None
) -> Iterator[tuple]:
    """Yields the rows of `SizeReport.parts` but for their bytes, layers first."""
    handled: set[str] = set()  # names of parameters
    for layer in layers:
        name, block, count = layer.name, layer.block, layer.params
        handled.add(f"{name}.weight")
        kind = "first and last layer" if layer.excluded in ENDS else "codes"
        if timesteps and layer.excluded == TIMED:
            handled.add(f"{name}.bias")
            if name.endswith("time_emb_proj"):
                shape = f"{timesteps}x{layer.out_channels}"
                row = "time features", timesteps * layer.out_channels, FEATURE_BITS, True
                yield f"{name}.features", block, *row, "F16", shape
        elif name in levels:
            unit = word(levels[name])
            words = str(unit.count(count))
            bits = bits_of_levels(levels[name])
            yield f"{name}.words", block, kind, count, bits, True, STORED_AS[unit.dtype], words
            kind = "scales" if kind == "codes" else kind
            count = layer.out_channels
            yield f"{name}.scale", block, kind, count, OTHER_BITS, False, "I16", str(count)
        else:
            kind = "weights left as they are" if kind == "codes" else kind
            shape = "x".join(map(str, layer.shape))
            yield f"{name}.weight", block, kind, count, 8 * HALF, True, "F16", shape
    if timesteps:
        row = "metadata", 0, 0.0, False, "I32", str(timesteps)
        yield "time_proj.timesteps_as_int32", "time_proj", *row
    for name, value in unet.named_parameters():
        if name not in handled:
            row = "biases and norms", value.numel(), OTHER_BITS, False
            yield name, block_of(name), *row, "F16", "x".join(map(str, value.shape))


def header_bytes(parts: pd.DataFrame, header: Header | None) -> int:
    """Returns the length of the header of a safetensors file with these tensors."""
    order = sorted(parts.itertuples(), key=lambda row: (-list(BYTES).index(row.dtype), row.name))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    if header is not None:
        digests = {row.name: 16 * "0" for row in order}
        entries["__metadata__"] |= replace(header, tensors=digests, config=64 * "0").metadata()
    end = 0
    for row in order:
        start, end = end, end + row.stored_bytes
        shape = [int(n) for n in row.shape.split("x")]
        entries[row.name] = {"dtype": row.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"))
    return 8 + len(text) + -len(text) % 8  # its length comes first; it is padded to 8 bytes


def meta_unet_of(model: str | Path) -> UNet2DConditionModel:
    """Builds the UNet of a model without its weights, from its configuration alone.

    Arguments:
        model: A name in `models.MODELS`, or the folder or hub id of a pipeline or a UNet.
    """
    if model == "sd15":
        return meta_unet(sd15_unet_config())
    source = MODELS.get(model, model) if isinstance(model, str) else model
    inside = (Path(source) / "unet").is_dir()
    config = UNet2DConditionModel.load_config(source, subfolder="unet" if inside else None)
    return meta_unet(config)
