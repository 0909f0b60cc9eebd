"""Progress of long steps: a bar for someone who looks on, else a line in the terminal of make.

A progress bar inside an executed notebook leaves a dead bar in its page, or a line per refresh,
and the terminal of make is out of the kernel's reach, whose streams go to the page. So a headless
run appends plain lines to the file named by `BF_PROGRESS`, and whoever runs the notebook shows
the newest of them (`relayed`). A regular file works alike on Linux and macOS, and never blocks.
"""

__all__ = ["describe", "duration", "progress", "relayed"]

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

WRITE_EVERY = 1.0  # seconds between two lines of the file
SHOW_EVERY = {"terminal": 0.5, "log": 15.0}  # seconds between two looks at it


def duration(seconds: float) -> str:
    """Returns a time as people say it: `8 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe(desc: str, done: int, total: int | None, rate: float | None) -> str:
    """Returns one line: what, how much of it, how fast, and how long it still takes.

    Arguments:
        desc: What is being done.
        done: The number of items done.
        total: The number of items, None when it is not known.
        rate: Items per second, None when it is not known yet.
    """
    parts = [f"{desc} {done}" if total is None else f"{desc} {done}/{total}"]
    if rate:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if total is not None and done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    return ", ".join(parts).strip()


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "") -> Iterator[T]:
    """Yields the items of an iterable and shows how far it has come.

    Arguments:
        iterable: What to go through.
        total: The number of items; taken from the iterable when it has a length.
        desc: What is being done, in a word or two.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if os.environ.get("BF_HEADLESS"):
        path = os.environ.get("BF_PROGRESS")
        return iter(iterable) if path is None else _reported(iterable, total, desc, Path(path))
    return iter(tqdm(iterable, total=total, desc=desc))


def _reported(iterable: Iterable[T], total: int | None, desc: str, path: Path) -> Iterator[T]:
    done, rate = 0, None
    last_done, last_time = 0, time.monotonic()
    _append(path, describe(desc, 0, total, None))
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last_time >= WRITE_EVERY:
            # Smoothed, because a resumed sweep passes what it has already in no time.
            recent = (done - last_done) / (now - last_time)
            rate = recent if rate is None else 0.7 * rate + 0.3 * recent
            last_done, last_time = done, now
            _append(path, describe(desc, done, total, rate))
    _append(path, describe(desc, done, total, rate))


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def relayed(
    path: Path,
    terminal: TextIO,
    prefix: str = "",
    every: float | None = None,
) -> Iterator[None]:
    """Shows the newest line of a progress file in a terminal for the duration of the block.

    A terminal gets one line that is rewritten; a log gets a line at most every 15 seconds.

    Arguments:
        path: The file that `progress` appends to; need not exist yet.
        terminal: The stream to write to.
        prefix: What to put before each line.
        every: The number of seconds between two looks at the file.
    """
    if every is None:
        every = SHOW_EVERY["terminal" if terminal.isatty() else "log"]
    stop = threading.Event()
    relay = threading.Thread(
        target=_relay, args=(path, terminal, prefix, every, stop), daemon=True
    )
    relay.start()
    try:
        yield
    finally:
        stop.set()
        relay.join()


def _relay(path: Path, terminal: TextIO, prefix: str, every: float, stop: threading.Event) -> None:
    shown = ""
    while not stop.wait(every):
        line = _newest(path)
        if line and line != shown:
            _show(terminal, prefix + line)
            shown = line
    if shown and terminal.isatty():
        _show(terminal, "")


def _newest(path: Path) -> str:
    """Returns the last complete line of a file, or nothing."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        complete = file.read().rpartition(b"\n")[0]
    return complete.rpartition(b"\n")[2].decode(errors="replace")


def _show(terminal: TextIO, line: str) -> None:
    if terminal.isatty():
        width = os.get_terminal_size(terminal.fileno()).columns or 80
        terminal.write(f"\r\x1b[K{line[: width - 1]}")  # a line that wraps cannot be rewritten
    else:
        terminal.write(line + "\n")
    terminal.flush()
