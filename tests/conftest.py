"""Fixtures that several test files share."""

import os

# What is compared with committed numbers is the CPU's, so a GPU is not seen by unit tests.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import settings

from bf_lib import train_mini, training_data

# The same examples each time, however busy the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

PARAMETERS = 'preset = "mini"\nseed = 0\nsteps = None'


@pytest.fixture(autouse=True)
def outside_of_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tests run alike by hand and under `make test`."""
    options = ("PARAMS", "PRESET", "SEED")
    for name in ("BF_HEADLESS", "BF_PROGRESS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", *options):
        monkeypatch.delenv(name, raising=False)


class Alone:
    """Stands for a pool of processes, and works in this one."""

    def Pool(self, processes):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, items, chunksize):
        return [function(item) for item in items]

    def starmap(self, function, items, chunksize):
        return [function(*item) for item in items]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve training scenes, encoded four at a time."""
    with_few_scenes(monkeypatch)


def with_few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `few` does, for fixtures that tests share."""
    monkeypatch.setattr(train_mini, "SCENES", 12)
    monkeypatch.setattr(train_mini, "ENCODED", 4)
    monkeypatch.setattr(training_data.training_images, "__defaults__", (12, 1))
    # Processes of their own would not know of this.
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: Alone())


@pytest.fixture
def write_notebook() -> Callable[..., Path]:
    """Writes a notebook of a heading, a cell of parameters and the code cells given."""

    def write(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
        new = nbformat.v4
        nb = new.new_notebook(
            cells=[
                new.new_markdown_cell(f"# {path.stem}\n\nA question.", id="title"),
                new.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
                *(new.new_code_cell(cell, id=f"cell-{n}") for n, cell in enumerate(cells)),
            ],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
        return path

    return write
