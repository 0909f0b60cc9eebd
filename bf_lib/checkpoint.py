"""What a packed checkpoint says of itself, and whether that is so (FORMAT.md).

A checkpoint is a folder of diffusers: `config.json`, and the tensors in one safetensors file or in
several. The header of each of these files holds, as JSON, how the tensors are to be read and a
digest of each. So a checkpoint that is cut off, altered, or put together of two, is not loaded.
Digests tell accidents; against whoever wants to deceive they are no protection.
"""

__all__ = [
    "CheckpointError",
    "Header",
    "config_digest",
    "decoded",
    "encoded",
    "left_out",
    "levels_digest",
    "read_header",
    "stored_names",
]

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bf_lib.entropy import compressed, decompressed
from bf_lib.layers import TIMED, Layer
from bf_lib.packed_weights import scale_of
from bf_lib.packing import has_only_codes, pack, unpack
from bf_lib.recipe import Recipe, RecipeError

FORMAT = 1
KEY = "bitsfusion"  # in the metadata of safetensors, and the method's name in config.json
COMPRESSIONS = (None, "zstd")
LEFT = "the recipe leaves it as it is"
# What safetensors calls the types of a checkpoint's tensors.
STORED_AS = {
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
LARGEST = 1 << 16  # of a number of levels, or of time-steps


class CheckpointError(ValueError):
    """A checkpoint is damaged, or not one of this format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """How the tensors of a checkpoint are to be read."""

    levels: Mapping[str, int]  # of each packed layer
    left: Mapping[str, str] = field(default_factory=dict)  # the other layers, and why not packed
    wide: Mapping[str, str] = field(default_factory=dict)  # tensors in float32, and why
    timesteps: int | None = None  # how many have cached features; None: it has its time layers
    compress: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)  # provenance of the recipe
    source: str = ""  # the model that was packed
    config: str = ""  # digest of config.json
    tensors: Mapping[str, str] = field(default_factory=dict)  # digests of all files' tensors
    recipe: str = ""  # digest of the levels
    format: int = FORMAT

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if wrong := [n for n, v in values.items() if not isinstance(v, KINDS[n])]:
            raise CheckpointError(f"entries of the header are of the wrong type: {wrong}")
        if self.format != FORMAT:
            raise CheckpointError(f"format {self.format!r} is not known, only {FORMAT}")
        if self.compress not in COMPRESSIONS:
            raise CheckpointError(f"compress must be None or 'zstd', got {self.compress!r}")
        if self.timesteps is not None and not 0 < self.timesteps <= LARGEST:
            raise CheckpointError(f"a cache has at least one time-step, not {self.timesteps!r}")
        try:
            Recipe(self.levels)
        except RecipeError as error:
            raise CheckpointError(str(error)) from error
        if self.levels and max(self.levels.values()) > LARGEST:
            raise CheckpointError(f"no layer has more than {LARGEST} levels")
        if self.recipe not in ("", levels_digest(self.levels)):
            raise CheckpointError("the levels are not those that the recipe's digest is of")
        object.__setattr__(self, "recipe", levels_digest(self.levels))

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of a safetensors file."""
        said = asdict(self)
        if not self.wide:  # of hardly any checkpoint
            del said["wide"]
        return {KEY: json.dumps(said, separators=(",", ":"), sort_keys=True)}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> Self:
        """Reads the metadata of a safetensors file.

        Raises:
            CheckpointError: If they are not those of a packed checkpoint.
        """
        try:
            return cls(**json.loads((metadata or {})[KEY]))
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"it has no header of a packed checkpoint: {error}") from error


KINDS = {
    "levels": Mapping,
    "left": Mapping,
    "wide": Mapping,
    "timesteps": int | None,
    "compress": str | None,
    "made": Mapping,
    "source": str,
    "config": str,
    "tensors": Mapping,
    "recipe": str,
    "format": int,
}


def read_header(files: Sequence[str | Path]) -> Header:
    """Reads the header of a checkpoint, which is the same in each of its files.

    Raises:
        CheckpointError: If a file is no safetensors file, or not one of a packed checkpoint.
    """
    headers = [Header.of(_metadata(Path(file))) for file in files]
    if any(header != headers[0] for header in headers[1:]):
        raise CheckpointError("the files are of different checkpoints")
    return headers[0]


def _metadata(file: Path) -> dict[str, str] | None:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is not a safetensors file: {error}") from error


def left_out(layers: Iterable[Layer], levels: Mapping[str, int], cached: bool) -> dict[str, str]:
    """Returns the layers that are not packed, and why.

    Arguments:
        layers: All layers of the original.
        levels: The levels of those that are packed.
        cached: Whether the outputs of the time layers are cached.
    """
    reasons = {layer.name: layer.excluded for layer in layers if layer.name not in levels}
    return {
        name: LEFT if reason is None or (reason == TIMED and not cached) else reason
        for name, reason in reasons.items()
    }


def levels_digest(levels: Mapping[str, int]) -> str:
    """Returns a digest of a recipe's levels, whatever their order."""
    return hashlib.sha256(json.dumps(dict(levels), sort_keys=True).encode()).hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """Returns a digest of what a config.json says of a model: all but names and versions."""
    said = {
        n: v for n, v in config.items() if not n.startswith("_") and n != "quantization_config"
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tensor_digest(value: Tensor) -> str:
    """Returns a digest of a tensor: type, shape and bytes."""
    digest = hashlib.blake2b(f"{value.dtype}{tuple(value.shape)}".encode(), digest_size=8)
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- tensors of a model <-> tensors of a file


def encoded(
    state: Mapping[str, Tensor], header: Header, weights: Mapping[str, int]
) -> tuple[dict[str, Tensor], Header]:
    """Returns the tensors to write, and the header with their digests.

    Floating-point tensors become float16 where that changes nothing.

    Arguments:
        state: The state of a packed model.
        header: What is known of it.
        weights: How many weights each packed layer has.
    """
    written = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if header.compress and kind == "words" and layer in header.levels:
            codes = unpack(value.cpu(), header.levels[layer], weights[layer])
            written[f"{layer}.zstd"] = compressed(codes, header.levels[layer])
        else:
            written[name] = _halved(value)
    digests = {name: tensor_digest(value) for name, value in written.items()}
    reasons = {name: _why_wide(name, value, header) for name, value in written.items()}
    wide = {name: reason for name, reason in reasons.items() if reason is not None}
    return written, replace(header, tensors=digests, wide=wide)


def decoded(
    stored: Mapping[str, Tensor], header: Header, weights: Mapping[str, int]
) -> dict[str, Tensor]:
    """Returns the tensors of a model from those of a file: the inverse of `encoded`.

    Raises:
        CheckpointError: If a tensor is not the one that was written, or is none of a checkpoint.
    """
    state = {}
    for name, value in stored.items():
        if tensor_digest(value) != header.tensors.get(name):
            raise CheckpointError(f"{name!r} is damaged: it is not the tensor that was written")
        layer, _, kind = name.rpartition(".")
        levels = header.levels.get(layer)
        if levels is not None and kind == "zstd":
            state[f"{layer}.words"] = _words(name, value, levels, weights[layer])
            continue
        if levels is not None and kind == "words" and not has_only_codes(value, levels):
            raise CheckpointError(f"{name!r} has numbers that are no words of its levels")
        if levels is not None and kind == "scale" and not _is_scale(value):
            raise CheckpointError(f"{name!r} has scales that are not positive numbers")
        # A tensor of a file keeps all of it in memory, which frames are only read from.
        state[name] = value.clone() if header.compress else value
    return state


def stored_names(names: Sequence[str], header: Header) -> list[str]:
    """Returns the names that a model's tensors have in a file."""
    layers = {f"{layer}.words": f"{layer}.zstd" for layer in header.levels}
    return [layers.get(name, name) if header.compress else name for name in names]


def _words(name: str, frame: Tensor, levels: int, count: int) -> Tensor:
    try:
        return pack(decompressed(frame, levels, count), levels)
    except ValueError as error:
        raise CheckpointError(f"{name!r} cannot be decoded: {error}") from error


def _why_wide(name: str, value: Tensor, header: Header) -> str | None:
    """Says why a tensor does not become float16, if it does not."""
    layer, _, kind = name.rpartition(".")
    if kind == "scale" and layer in header.levels and value.dtype == torch.int32:
        scales = scale_of(value)
        return f"scales from {scales.min():.1e} to {scales.max():.1e}: float16 is too coarse"
    if value.is_floating_point() and value.dtype != torch.float16:
        return "float16 does not have all of its values"
    return None


def _is_scale(value: Tensor) -> bool:
    numbers = scale_of(value)
    return bool(((numbers > 0) & numbers.isfinite()).all())


def _halved(value: Tensor) -> Tensor:
    """Returns a tensor as float16 if each of its values is one, else as it is."""
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    return half if torch.equal(half.to(value.dtype), value) else value
