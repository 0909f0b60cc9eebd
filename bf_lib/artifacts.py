"""Results on disk: tables, records, tensors and figures, each with a sidecar that says whence.

Formats are exact and readable without this library: CSV, JSON, safetensors, PNG and SVG; never a
pickle. Every file is written completely or not at all, and loading compares it with its sidecar's
digest. A sidecar holds only what stays the same while the result does; `render.json` the rest.
"""

__all__ = [
    "AlteredArtifact",
    "MissingArtifact",
    "Origin",
    "load_json",
    "load_table",
    "load_tensors",
    "plain",
    "save_figure",
    "save_json",
    "save_table",
    "save_tensors",
    "write_json",
]

import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import safetensors.torch
from matplotlib.figure import Figure
from torch import Tensor

from bf_lib.atomic import write_atomically
from bf_lib.provenance import sha256

PNG_DPI = 200


class MissingArtifact(FileNotFoundError):
    """A result of an earlier notebook is not there; says which notebook to run."""

    def __init__(self, path: Path) -> None:
        preset, notebook = path.parts[-3:-1]
        super().__init__(
            f"{'/'.join(path.parts[-5:])} is missing: run notebook {notebook}, "
            f"or `make reproduce PRESET={preset}`"
        )


class AlteredArtifact(ValueError):
    """A file is not what its sidecar says it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What made an artifact, and from what."""

    made_by: str  # name of the notebook
    preset: str
    seed: int
    parameters: dict[str, object] = field(default_factory=dict)  # that differ from the preset's
    study: dict[str, object] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # file -> digest


# ---- tables ----------------------------------------------------------------------------------


def save_table(frame: pd.DataFrame, path: Path, origin: Origin) -> None:
    """Writes a table as CSV, such that `load_table` returns exactly the same one.

    Arguments:
        frame: The table, with a plain index and columns of numbers, booleans or text.
        path: The file, ending in `.csv`.
        origin: What made it.
    """
    data = frame.to_csv(index=False, lineterminator="\n").encode()
    dtypes = {name: str(dtype) for name, dtype in frame.dtypes.items()}
    try:
        pd.testing.assert_frame_equal(_parse_table(data, dtypes), frame, check_exact=True)
    except (AssertionError, TypeError, ValueError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ValueError(
            f"{path.name}: a table of these types does not survive CSV ({reason}); "
            "reset the index, and keep to numbers, booleans and text that is not empty"
        ) from err
    _save(data, path, origin, columns=dtypes)


def load_table(path: Path) -> pd.DataFrame:
    """Reads a table that `save_table` wrote."""
    data, sidecar = _load(path)
    return _parse_table(data, sidecar["columns"])


def _parse_table(data: bytes, dtypes: dict[str, str]) -> pd.DataFrame:
    return pd.read_csv(
        io.BytesIO(data),
        dtype=dtypes,
        keep_default_na=False,  # a layer may be called "NA"; only an empty cell is missing
        na_values=[""],
    )


# ---- records and tensors -----------------------------------------------------------------------


def plain(value: object, where: str = "value") -> object:
    """Returns a value in JSON's own types, so that what is read back is what was written.

    Arguments:
        value: Nested dicts, lists, tuples, numbers and text; numpy scalars become python's.
        where: How to call it in an error.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where}: keys of a record must be text, got {wrong[0]!r}")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: JSON has no {value}; use None for what is not there")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: a record cannot hold a {type(value).__name__}")


def save_json(record: object, path: Path, origin: Origin) -> None:
    """Writes a record as JSON; its order is kept."""
    _save(_json(plain(record, path.stem)), path, origin)


def load_json(path: Path) -> object:
    """Reads a record that `save_json` wrote."""
    return json.loads(_load(path)[0])


def save_tensors(tensors: dict[str, Tensor], path: Path, origin: Origin) -> None:
    """Writes named tensors as safetensors."""
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _save(safetensors.torch.save(kept), path, origin)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads named tensors that `save_tensors` wrote, to the CPU."""
    return safetensors.torch.load(_load(path)[0])


def write_json(record: object, path: Path) -> None:
    """Writes a record without a sidecar, with sorted keys: a sidecar itself, for example."""
    write_atomically(path, _json(plain(record, path.stem), sort=True))


def _json(record: object, sort: bool = False) -> bytes:
    text = json.dumps(record, indent=1, sort_keys=sort, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


# ---- figures -----------------------------------------------------------------------------------


def save_figure(
    figure: Figure,
    stem: Path,
    origin: Origin,
    caption: str,
    drawing: dict[str, object] | None = None,
) -> None:
    """Writes a figure as PNG and SVG, byte for byte the same each time.

    Arguments:
        figure: The figure.
        stem: The file without its suffix.
        origin: What made it.
        caption: What a reader should see in it.
        drawing: The call that draws it again; None when it cannot be drawn from saved tables.
    """
    data = {"png": _render(figure, "png"), "svg": _render(figure, "svg")}
    sidecar = asdict(origin) | {
        "caption": caption,
        "content": {kind: sha256(content) for kind, content in data.items()},
        "drawing": drawing,
    }
    plain(sidecar, stem.name)  # before anything is written
    for kind, content in data.items():
        write_atomically(stem.with_name(f"{stem.name}.{kind}"), content)
    write_json(sidecar, stem.with_name(f"{stem.name}.json"))


def _render(figure: Figure, kind: str) -> bytes:
    # Dates, versions and random ids are what would differ between two equal figures.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "bf_lib"}):
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()


# ---- files and sidecars ------------------------------------------------------------------------


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.stem}.meta.json")


def _save(data: bytes, path: Path, origin: Origin, **more: object) -> None:
    write_atomically(path, data)
    write_json(asdict(origin) | {"content": sha256(data)} | more, _sidecar(path))


def _load(path: Path) -> tuple[bytes, dict]:
    for needed in (path, _sidecar(path)):
        if not needed.exists():
            raise MissingArtifact(needed)
    data = path.read_bytes()
    sidecar = json.loads(_sidecar(path).read_bytes())
    if sidecar["content"] != sha256(data):
        raise AlteredArtifact(
            f"{'/'.join(path.parts[-5:])} is not what notebook {sidecar['made_by']} wrote; "
            "run it again"
        )
    return data, sidecar
