"""The folder of a packed checkpoint: looked through before it is loaded, and written in one go."""

__all__ = ["checked", "config_of", "replaced_at_once", "weight_files"]

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bf_lib.atomic import told_when_full
from bf_lib.checkpoint import (
    KEY,
    CheckpointError,
    Header,
    config_digest,
    read_header,
    stored_names,
)
from bf_lib.models import meta_unet
from bf_lib.packed_layers import prepare_

LONGEST = 1 << 24  # of a JSON file, in bytes
LARGEST = 1 << 16  # of a width or a count in config.json
MOST = 64  # entries of a list in it, and layers of a block
WEIGHTS = re.compile(r"diffusion_pytorch_model[\w.-]*\.safetensors(\.index\.json)?")

# How safetensors calls the types of a checkpoint's tensors.
NAMES = {
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
}
FLOATS = ("F16", "BF16", "F32")


def checked(folder: str | Path) -> Header:
    """Makes sure that a folder holds a packed UNet that can be loaded, before anything is loaded.

    Only headers are read, and only shapes are built. The digests of tensors are compared when
    they are loaded.

    Returns:
        The header.

    Raises:
        CheckpointError: If it does not.
    """
    folder = Path(folder)
    config = config_of(folder)
    files = weight_files(folder)
    header = read_header(files)
    if config_digest(config) != header.config:
        raise CheckpointError(f"{folder}: config.json is not the one that the weights are of")
    try:
        expected = shapes_of(config, header).state_dict()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its configuration makes no UNet: {error}") from error
    found = {name: tensor for file in files for name, tensor in _tensors(file).items()}
    wanted = dict(zip(stored_names(list(expected), header), expected.values(), strict=True))
    if wrong := sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"{folder}: missing or unknown tensors: {', '.join(wrong[:5])}")
    for name, (kind, shape) in found.items():
        if not _fits(name, kind, shape, wanted[name]):
            raise CheckpointError(f"{folder}: {name!r} is {kind} {shape}, which does not fit")
    return header


def config_of(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a packed UNet.

    Raises:
        CheckpointError: If it is not there, or not one; or if a number in it is out of all reason.
    """
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != KEY:
        raise CheckpointError(f"{folder} is no packed checkpoint: its config.json does not say so")
    for name, value in config.items():
        entries = value if isinstance(value, list) else [value]
        limit = MOST if "layers_per_block" in name else LARGEST
        if len(entries) > MOST or any(
            isinstance(entry, int | float) and abs(entry) > limit for entry in entries
        ):
            raise CheckpointError(f"{folder}: {name!r} of config.json is {str(value)[:80]}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the tensors of a checkpoint.

    Raises:
        CheckpointError: If there are none, or if the index of several names others than those.
    """
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    index = _read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
    names = sorted(set(index.values()), key=str) if isinstance(index, dict) else []
    for name in names:
        # A name is never a path, which might lead anywhere.
        if not isinstance(name, str) or not WEIGHTS.fullmatch(name):
            raise CheckpointError(f"{folder}: its index names {str(name)[:80]!r}")
    if not names:
        raise CheckpointError(f"{folder}: its index names no files")
    return [folder / name for name in names]


def shapes_of(config: dict[str, Any], header: Header) -> nn.Module:
    """Builds a packed UNet without its weights."""
    unet = meta_unet({n: v for n, v in config.items() if n != "quantization_config"})
    prepare_(unet, header.levels, header.timesteps)
    return unet


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST:
            raise CheckpointError(f"{path} is too long")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no object")
    return value


def _tensors(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns the type and the shape of each tensor of a file, from its header."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), s.get_shape()) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _fits(name: str, kind: str, shape: list[int], wanted: Tensor) -> bool:
    """Whether a stored tensor is what a model's may be stored as."""
    if name.endswith(".zstd"):
        return kind == "U8" and len(shape) == 1
    if wanted.is_floating_point():
        return kind in FLOATS and shape == list(wanted.shape)
    return kind == NAMES.get(str(wanted.dtype)) and shape == list(wanted.shape)


# ---- writing


@contextmanager
def replaced_at_once(folder: str | Path) -> Iterator[Path]:
    """Gives a place to write a checkpoint to, and moves it to its folder when it is complete.

    Until then nothing of the folder changes. Files take the place of others one by one, the
    weights last: an older checkpoint of the same UNet has the same config.json, so at any moment
    it is the old one or the new one. Where they do not belong together, which a kill between two
    renames can leave, the header says so and nothing is loaded.
    """
    folder = Path(folder)
    with told_when_full(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield place
            for file in place.iterdir():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            folder.mkdir(exist_ok=True)
            fresh = sorted(place.iterdir(), key=lambda file: bool(WEIGHTS.fullmatch(file.name)))
            for file in fresh:
                file.chmod(0o644)
                file.replace(folder / file.name)
            names = {file.name for file in fresh}
            for file in folder.iterdir():  # parts of a checkpoint that had others
                if WEIGHTS.fullmatch(file.name) and file.name not in names:
                    file.unlink()
        finally:
            shutil.rmtree(place, ignore_errors=True)
