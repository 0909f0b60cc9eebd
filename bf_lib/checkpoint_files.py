"""The folder of a packed checkpoint: looked through before it is loaded, and written in one go."""

__all__ = ["checked", "checked_files", "config_of", "replaced_at_once", "shapes_of"]

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bf_lib.atomic import sync_folder, told_when_full
from bf_lib.checkpoint import (
    KEY,
    STORED_AS,
    CheckpointError,
    Header,
    config_digest,
    read_header,
    stored_names,
)
from bf_lib.models import meta_unet
from bf_lib.packed_layers import packed_layers, prepare_

# What diffusers may raise when it builds a UNet from a configuration that makes no sense.
NO_UNET = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
LONGEST = 1 << 24  # of a JSON file, in bytes
LARGEST = 1 << 16  # of a width or a count in config.json
MOST = 64  # entries of a list in it
DEEPEST = 256  # blocks times layers times layers within them; SD-v1.5 has 4 x 2 x 1
HEAVIEST = 1 << 28  # weights of one layer; SD-v1.5's largest has 29 million
MOST_DENSE = 64  # bytes of packed codes for a byte of the files, which zstd does with zeros only
# The files that diffusers keeps weights in: shards or not, of a variant or not.
STEM = "diffusion_pytorch_model"
WEIGHTS = re.compile(rf"{STEM}(?P<variant>\.[\w-]+?)?(-\d{{5}}-of-\d{{5}}(-\w+)?)?\.safetensors")
INDEX = re.compile(rf"{STEM}\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}")

PARTIAL = ".partial-"

FLOATS = ("F16", "BF16", "F32")


def checked(folder: str | Path, variant: str | None = None) -> Header:
    """Makes sure that a folder holds a packed UNet that can be loaded, before anything is loaded.

    Only headers are read, and only shapes are built. The digests of tensors are compared when
    they are loaded.

    Arguments:
        folder: The folder.
        variant: Of several sets of weights in it, as diffusers names them.

    Returns:
        The header.

    Raises:
        CheckpointError: If it does not.
    """
    folder = Path(folder)
    return checked_files(config_of(folder), weight_files(folder, variant))


def checked_files(config: Mapping[str, Any], files: Sequence[Path]) -> Header:
    """Makes sure that files hold the weights of a packed UNet.

    Raises:
        CheckpointError: If they do not.
    """
    where = files[0].parent
    header = read_header(files)
    if config_digest(config) != header.config:
        raise CheckpointError(f"{where}: config.json is not the one that the weights are of")
    try:
        unet = shapes_of(config, header)
    except NO_UNET as error:
        raise CheckpointError(f"{where}: its configuration makes no UNet: {error}") from error
    weights = {name: prod(layer.shape) for name, layer in packed_layers(unet).items()}
    if heavy := [name for name, count in weights.items() if count > HEAVIEST]:
        raise CheckpointError(f"{where}: {heavy[0]!r} has too many weights")
    size = sum(file.stat().st_size for file in files)
    if sum(layer.words.nbytes for layer in packed_layers(unet).values()) > MOST_DENSE * size:
        raise CheckpointError(f"{where}: a file of {size:,} bytes cannot hold so large a UNet")
    expected = unet.state_dict()
    found = {name: tensor for file in files for name, tensor in _tensors(file).items()}
    wanted = dict(zip(stored_names(list(expected), header), expected.values(), strict=True))
    if wrong := sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"{where}: missing or unknown tensors: {', '.join(wrong[:5])}")
    for name, (kind, shape) in found.items():
        if not _fits(name, kind, shape, wanted[name]):
            raise CheckpointError(f"{where}: {name!r} is {kind} {shape}, which does not fit")
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
    depth = 1
    for name, value in config.items():
        entries = list(_flat(value))
        numbers = [entry for entry in entries if isinstance(entry, int | float)]
        if len(entries) > MOST or any(not 0 <= abs(number) <= LARGEST for number in numbers):
            raise CheckpointError(f"{folder}: {name!r} of config.json is {str(value)[:80]}")
        if name == "down_block_types":
            depth *= max(1, len(entries))
        if name.endswith("layers_per_block"):
            depth *= max([1, *numbers])
    if depth > DEEPEST:
        raise CheckpointError(f"{folder}: config.json is of a UNet of some {depth:,} layers")
    return config


def _flat(value: object) -> Iterator[object]:
    """Yields the entries of a list, and of the lists in it."""
    if isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _flat(entry)
    else:
        yield value


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Returns the files that hold the tensors of a checkpoint.

    Raises:
        CheckpointError: If there are none, or if the index of several names others than those.
    """
    part = f".{variant}" if variant else ""
    path = folder / f"{STEM}.safetensors.index{part}.json"
    if not path.is_file():  # where there is one, diffusers reads what it names
        whole = folder / f"{STEM}{part}.safetensors"
        if not whole.is_file():
            raise CheckpointError(f"{folder}: {whole.name} is not there")
        return [whole]
    index = _read_json(path).get("weight_map")
    names = list(index.values()) if isinstance(index, dict) else []
    for name in names:
        # A name is never a path, which might lead anywhere.
        if not isinstance(name, str) or not WEIGHTS.fullmatch(name) or not SHARD.search(name):
            raise CheckpointError(f"{folder}: its index names {str(name)[:80]!r}")
    if not names:
        raise CheckpointError(f"{folder}: its index names no files")
    return [folder / name for name in sorted(set(names))]


def shapes_of(config: Mapping[str, Any], header: Header) -> nn.Module:
    """Builds a packed UNet without its weights."""
    unet = meta_unet({n: v for n, v in config.items() if n != "quantization_config"})
    prepare_(unet, header.levels, header.timesteps, header.wide)
    return unet


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would never end
            raise CheckpointError(f"{path} is not there")
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise CheckpointError(f"{path} is too long")
        value = json.loads(data)
    except CheckpointError:
        raise
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
    return kind == STORED_AS.get(wanted.dtype) and shape == list(wanted.shape)


# ---- writing


@contextmanager
def replaced_at_once(folder: str | Path) -> Iterator[Path]:
    """Gives a place to write a checkpoint to, and moves it to its folder when it is complete.

    Until then nothing of the folder changes. Then the parts of a checkpoint that has several are
    moved, under names that no other checkpoint has; then config.json; and last the file that is
    read first. So at any moment it is the old checkpoint or the new one, as long as both are of
    the same UNet, whose config.json does not change. Where it does, a kill between the last two
    leaves files that do not belong together; their headers say so, and they are not loaded.
    """
    folder = Path(folder)
    with told_when_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PARTIAL}*"):
            if not _is_alive(left.name.removeprefix(PARTIAL).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)  # by a save that was killed
        place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{PARTIAL}{os.getpid()}-"))
        try:
            yield place
            _rename_shards(place)
            fresh = sorted(place.iterdir(), key=_turn)
            for file in fresh:
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            names = {file.name for file in fresh}
            for file in fresh:
                file.chmod(0o644)
                file.replace(folder / file.name)
            saved = {variant for name in names if (variant := _variant(name)) is not None}
            # What an older checkpoint had in its place: first what is read first.
            for file in sorted(folder.iterdir(), key=_turn, reverse=True):
                if file.name not in names and _variant(file.name) in saved:
                    file.unlink()
            sync_folder(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _rename_shards(place: Path) -> None:
    """Gives the shards of a checkpoint names of its own, which its index then says."""
    for path in place.iterdir():
        if INDEX.fullmatch(path.name):
            index, mark = json.loads(path.read_bytes()), f"-{uuid.uuid4().hex[:8]}"
            names = set(index["weight_map"].values())
            new = {name: name.replace(".safetensors", f"{mark}.safetensors") for name in names}
            for name in names:
                (place / name).rename(place / new[name])
            index["weight_map"] = {k: new[name] for k, name in index["weight_map"].items()}
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _variant(name: str) -> str | None:
    """Returns the variant that a file of weights or an index is of; None of other files."""
    found = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return None if found is None else found["variant"] or ""


def _turn(file: Path) -> int:
    """Returns when a file is to be moved: shards, whatever else, and last what is read first."""
    if _variant(file.name) is None:
        return 1
    return 0 if SHARD.search(file.name) else 2


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
