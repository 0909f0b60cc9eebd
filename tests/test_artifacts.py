import errno
import json
import math
import os

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from bf_lib import artifacts
from bf_lib.artifacts import AlteredArtifact, MissingArtifact, Origin
from bf_lib.atomic import DiskFull, append_line, write_atomically

ORIGIN = Origin(made_by="03_toy", preset="mini", seed=0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "runs" / "mini" / "03_toy"


def test_a_table_round_trips_exactly(folder):
    frame = pd.DataFrame(
        {
            "layer": ["down.0", "NA", "007", "with, comma"],
            "bits": [1, 2, 3, 2**62],
            "mse": [0.1, 1e-300, math.nan, math.inf],
            "single": np.array([0.1, 1 / 3, 2e-38, 7.0], dtype=np.float32),
            "kept": [True, False, True, True],
            "note": ["a", None, "c", "d"],
        }
    )
    artifacts.save_table(frame, folder / "rows.csv", ORIGIN)
    pd.testing.assert_frame_equal(
        artifacts.load_table(folder / "rows.csv"), frame, check_exact=True
    )


@given(st.lists(st.floats(), min_size=1))
def test_every_float_survives_csv(values):
    frame = pd.DataFrame({"x": values})
    data = frame.to_csv(index=False).encode()
    pd.testing.assert_frame_equal(
        artifacts._parse_table(data, {"x": "float64"}), frame, check_exact=True
    )


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"x": [1.0]}, index=["named"]),
        pd.DataFrame({"x": [""]}),
        pd.DataFrame({"x": [(1, 2)]}),
        pd.DataFrame({"x": pd.to_datetime(["2020-01-01"])}),
    ],
    ids=["index", "empty text", "tuples", "dates"],
)
def test_a_table_that_csv_would_change_is_refused(folder, frame):
    with pytest.raises(ValueError, match="x.csv: a table of these types does not survive CSV"):
        artifacts.save_table(frame, folder / "x.csv", ORIGIN)
    assert not folder.exists()


def test_a_record_round_trips_in_its_order(folder):
    record = {"b": [1, 2.5, None, True], "a": {"text": "é", "number": np.int64(3)}, "t": (1, 2)}
    artifacts.save_json(record, folder / "record.json", ORIGIN)
    loaded = artifacts.load_json(folder / "record.json")
    assert loaded == {"b": [1, 2.5, None, True], "a": {"text": "é", "number": 3}, "t": [1, 2]}
    assert list(loaded) == ["b", "a", "t"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"rows": [{1: 2}]}, r"record.rows\[0\]: keys of a record must be text, got 1"),
        ({"x": math.nan}, "record.x: JSON has no nan"),
        ({"x": {1, 2}}, "record.x: a record cannot hold a set"),
    ],
)
def test_a_record_that_json_would_change_is_refused(folder, record, said):
    with pytest.raises(ValueError, match=said):
        artifacts.save_json(record, folder / "record.json", ORIGIN)


def test_tensors_round_trip(folder):
    tensors = {"codes": torch.arange(6, dtype=torch.int8).view(2, 3).T, "scale": torch.rand(3)}
    artifacts.save_tensors(tensors, folder / "packed.safetensors", ORIGIN)
    loaded = artifacts.load_tensors(folder / "packed.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_the_sidecar_says_whence_and_nothing_that_changes(folder):
    artifacts.save_json([1], folder / "one.json", ORIGIN)
    first = (folder / "one.meta.json").read_bytes()
    artifacts.save_json([1], folder / "one.json", ORIGIN)
    assert (folder / "one.meta.json").read_bytes() == first
    sidecar = json.loads(first)
    assert sidecar["made_by"] == "03_toy" and sidecar["content"].startswith("sha256:")
    assert list(sidecar) == sorted(sidecar)


def test_what_is_missing_names_the_notebook_to_run(folder):
    with pytest.raises(MissingArtifact, match="data/runs/mini/03_toy/rows.csv .* notebook 03_toy"):
        artifacts.load_table(folder / "rows.csv")


def test_what_was_altered_is_refused(folder):
    artifacts.save_table(pd.DataFrame({"x": [1]}), folder / "rows.csv", ORIGIN)
    (folder / "rows.csv").write_text("x\n2\n")
    with pytest.raises(AlteredArtifact, match="not what notebook 03_toy wrote"):
        artifacts.load_table(folder / "rows.csv")


def figure() -> Figure:
    drawn = Figure()
    drawn.subplots().plot([0, 1], [1, 0])
    return drawn


def test_figures_are_the_same_bytes_each_time(tmp_path):
    for name in ("first", "second"):
        artifacts.save_figure(figure(), tmp_path / name, ORIGIN, caption="A line.")
    for kind in ("png", "svg"):
        first, second = ((tmp_path / f"{n}.{kind}").read_bytes() for n in ("first", "second"))
        assert first == second
        assert mpl.__version__.encode() not in first  # an upgrade alone changes no file
    assert json.loads((tmp_path / "first.json").read_text())["caption"] == "A line."


# ---- files -------------------------------------------------------------------------------------


def test_writing_makes_folders_and_readable_files(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "fdopen"])
def test_a_full_disk_is_said_and_keeps_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "rows.csv"
    write_atomically(path, b"old")

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(DiskFull, match="no space left for rows.csv"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_lines_are_added_whole_or_to_be_skipped(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_atomically(path, b"header")
    append_line(path, "one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, data[:3]))
    with pytest.raises(DiskFull, match="no space left for rows.jsonl"):
        append_line(path, "two")
    monkeypatch.undo()
    append_line(path, "three")
    assert path.read_text().split("\n") == ["header", "one", "tw", "three"]
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "nowhere", "one")


def test_other_errors_are_not_renamed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file" / "below", b"")
