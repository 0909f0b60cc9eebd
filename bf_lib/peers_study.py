"""What a UNet weighs and costs when others store it: one UNet, one machine, one run."""

__all__ = ["stored_by"]

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from bf_lib.layers import Layer, all_layers
from bf_lib.peers import Peer, installed
from bf_lib.processes import end_with_parent, starter
from bf_lib.timing import loaded, medians_in_turns, unet_inputs

COLUMNS = [
    "peer",
    "conv",
    "layers",
    "file_mb",
    "stored_bits",
    "relative_error",
    "load_s",
    "step_s",
    "full_step_s",
    "resident_mb",
    "in_memory",
    "error",
]
NONE = "none"
FLOATS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}  # types of tensors in files
CODES = "codes"  # any other


def stored_by(
    unet_folder: Path,
    peers: Sequence[Peer],
    latents: int = 32,
    threads: int = 1,
    *,
    timestep: float = 481.0,
    repeats: int = 5,
    timeout: float = 3600.0,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Stores a UNet by each peer, loads it again, and runs it beside the original.

    Each is stored in one process and loaded in another, so that memory is that of a process. A
    peer that fails, or does not end, says so in its row and stops no other.

    Arguments:
        unet_folder: The original in float32, as diffusers saves it.
        peers: The peers.
        latents: The width and height of latents; a step has two of them.
        threads: Of torch.
        timestep: Of the steps; one of those whose features are cached, where they are.
        repeats: Of a step, in turns with the original; medians are reported.
        timeout: Seconds that a process has.
        folder: Where files go until they are measured; by default where temporary files go.

    Returns:
        One row a peer, with columns peer, conv (whether the weights of convolutions are stored as
        something else than floats), layers (how many conv and linear layers are), file_mb and
        stored_bits (all files of weights; bits for each parameter of the original),
        relative_error (of the output of a step, without any training: the norm of its difference
        from the original's, by the norm of that), load_s, step_s and full_step_s (the original's),
        resident_mb (by which the process grows when it is loaded), in_memory ("decoded" for peers
        whose files become an ordinary UNet, otherwise "packed") and error (in one line; "none" if
        there is none).
    """
    rows = []
    for peer in peers:
        row = {"peer": peer.name, "in_memory": "decoded" if peer.decoded else "packed"}
        if not installed(peer):
            rows.append(row | {"conv": NONE, "error": "not installed"})
            continue
        with TemporaryDirectory(dir=folder) as place:
            given = (peer, Path(unet_folder), Path(place) / "unet", threads)
            row |= _apart(_stored, *given, timeout=timeout)
            if "error" not in row:
                row |= _apart(_loaded, *given, latents, timestep, repeats, timeout=timeout)
        rows.append({"conv": NONE, "error": NONE} | row)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"layers": "Int64"})


# ---- what processes do


def _stored(peer: Peer, original: Path, folder: Path, threads: int) -> dict[str, float | str]:
    """Stores a UNet, and measures its files."""
    torch.set_num_threads(threads)
    unet = _original(original)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    layers = all_layers(unet)
    folder.mkdir()
    peer.store(unet, folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")
    found = dict(_tensors(folder))
    kinds = {layer: _stored_as(layer, found) for layer in layers}
    return {
        "conv": _share({layer: kind for layer, kind in kinds.items() if layer.kind == "conv"}),
        "layers": sum(kind == CODES for kind in kinds.values()),
        "file_mb": size / 1e6,
        "stored_bits": 8 * size / parameters,
    }


def _loaded(
    peer: Peer,
    original: Path,
    folder: Path,
    threads: int,
    latents: int,
    timestep: float,
    repeats: int,
) -> dict[str, float]:
    """Loads a UNet, and times its steps beside those of the original."""
    torch.set_num_threads(threads)
    if peer.package is not None:
        importlib.import_module(peer.package)
    full = _original(original)  # first, so that the growth is not that of diffusers at first use
    unet, loading, grown = loaded(lambda: peer.load(folder))
    x, text = unet_inputs(full, latents)

    @torch.no_grad()  # not inference mode, in which quanto does not run
    def step(model: nn.Module) -> Tensor:
        return model(x, torch.tensor(timestep), encoder_hidden_states=text).sample

    got, wanted = step(unet), step(full)  # which also compiles what is to be compiled
    runs = {"step_s": lambda: step(unet), "full_step_s": lambda: step(full)}
    error = ((got - wanted).norm() / wanted.norm()).item()
    found = {"relative_error": error, "load_s": loading, "resident_mb": grown / 1e6}
    return found | medians_in_turns(runs, repeats)


def _original(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yields the tensors of all files: the name, and the type and the number of values."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dictionary
                part = tensors.get_slice(name)
                yield name, (part.get_dtype(), prod(part.get_shape()))
    for file in folder.glob("*.gguf"):
        from gguf import GGUFReader

        for tensor in GGUFReader(file).tensors:
            yield tensor.name, (tensor.tensor_type.name, int(tensor.n_elements))


def _stored_as(layer: Layer, tensors: dict[str, tuple[str, int]]) -> str | None:
    """Returns "codes", or the type of floats that the weight of a layer is stored as.

    It is None for a layer that is not stored, such as one whose outputs are.
    """
    parts = [part for name, part in tensors.items() if name.startswith(f"{layer.name}.")]
    whole = (FLOATS[kind] for kind, count in parts if kind in FLOATS and count == layer.params)
    coded = any(kind not in FLOATS for kind, _ in parts)
    return next(whole, CODES if coded else None)


def _share(kinds: dict[Layer, str | None]) -> str:
    """Says which share of the weights of layers is stored as something else than floats."""
    weights = sum(layer.params for layer in kinds)
    share = sum(layer.params for layer, kind in kinds.items() if kind == CODES) / weights
    if share == 0:
        return f"left in {', '.join(sorted({str(kind) for kind in kinds.values()}))}"
    return "quantized" if share > 0.995 else f"{share:.0%} quantized"


# ---- processes


def _apart(function: Callable[..., dict], *arguments: object, timeout: float) -> dict:
    """Calls a function in a process of its own; returns its answer, or its error in one line."""
    context = starter(__name__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    with _silenced():  # also what starts processes, in which packages complain on import
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"error": f"no answer within {timeout:g} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()


def _answer(sender: Connection, function: Callable[..., dict], arguments: tuple) -> None:
    end_with_parent()
    with _silenced():
        try:
            answer = function(*arguments)
        except Exception as error:  # whatever a peer raises belongs in its row
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    sender.send(answer)


@contextmanager
def _silenced() -> Iterator[None]:
    """Drops what this process, and those that it starts, print: a notebook would show it."""
    streams = (1, 2)
    kept = [os.dup(stream) for stream in streams]
    try:
        with open(os.devnull, "w") as nowhere:
            for stream in streams:
                os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        for stream, old in zip(streams, kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
