"""What a process prints that nobody asked for."""

__all__ = ["without_output"]

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_output() -> Iterator[None]:
    """Drops what compiled code prints, such as HiGHS's lines for debugging, which no option stops.

    Its output is that of the process and not Python's `sys.stdout`, and may wait in a buffer of
    its own, which is emptied before and after.
    """
    sys.stdout.flush()
    _flush_compiled()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush_compiled()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush_compiled() -> None:
    with suppress(TypeError):  # of Windows, where a process has no such name
        ctypes.CDLL(None).fflush(None)
