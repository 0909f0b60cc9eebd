"""The log of a training, as its first process sees it: a CSV file that survives a kill."""

__all__ = ["LOGGED", "TrainingLog"]

import csv
import io
import time
from pathlib import Path

from torch import Tensor

from bf_lib.atomic import write_atomically

LOGGED = 20  # steps that a row of the log is the mean of


class TrainingLog:
    """Means of the scalars over stretches of steps, as rows of a CSV file.

    Arguments:
        path: The file; its rows up to `first` are kept.
        first: The step that the training begins or goes on with.
        last: How many steps it has, after which the last row is written.
    """

    def __init__(self, path: Path, first: int, last: int) -> None:
        self.path, self.last = path, last
        self.sums: dict[str, float] = {}
        self.count, self.since = 0, time.perf_counter()
        self.rows: list[dict] = []
        if first and path.exists():
            with path.open() as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]

    def add(self, step: int, rate: float, scalars: dict[str, Tensor]) -> None:
        """Adds a step, counted from 0, with its learning rate and scalars by name."""
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.count += 1
        if (step + 1) % LOGGED and step + 1 < self.last:
            return
        line = {name: total / self.count for name, total in self.sums.items()}
        seconds = (time.perf_counter() - self.since) / self.count
        self.rows.append({"step": step + 1, "lr": rate, **line, "seconds_per_step": seconds})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[-1])
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode())
        self.sums, self.count, self.since = {}, 0, time.perf_counter()
