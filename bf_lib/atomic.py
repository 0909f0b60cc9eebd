"""Files and lines that are there completely or not at all."""

__all__ = ["DiskFull", "append_line", "sync_folder", "told_when_full", "write_atomically"]

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DiskFull(OSError):
    """There was no room for a file; what was there before is untouched."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file such that a kill, a crash or a full disk leaves the old one or the new one.

    Arguments:
        path: The file; its folder is made when it is missing.
        data: The whole content.
    """
    with told_when_full(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_rename(path, data)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file that several processes may add to at once.

    A line begins, not ends, with a line break: what a kill or a full disk leaves of one is a line
    of its own, and does not spoil the next.

    Arguments:
        path: The file, which must be there.
        line: The line, without a line break.
    """
    data = f"\n{line}".encode()
    with told_when_full(path, len(data)):
        number = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            # In one go, so that processes do not mix their lines.
            if os.write(number, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(number)


@contextmanager
def told_when_full(path: Path, size: int | None = None) -> Iterator[None]:
    """Turns the error of a full disk into one that says what there was no room for.

    Arguments:
        path: What is written.
        size: Its bytes, if they are known.
    """
    try:
        yield
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = "" if size is None else f" ({size / 1e6:.1f} MB)"
        raise DiskFull(
            err.errno,
            f"no space left for {path.name}{said}; nothing was overwritten. "
            "Free some space and run the same command again",
            str(path.parent),
        ) from err


def _write_and_rename(path: Path, data: bytes) -> None:
    # In the same folder, because a rename is atomic only within one file system.
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename itself survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
