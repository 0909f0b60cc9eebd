"""Seeds for other purposes than the noise of an image, so that no two share random numbers."""

__all__ = ["derived_seeds"]

import zlib
from collections.abc import Iterable

import numpy as np


def derived_seeds(purpose: str, seeds: Iterable[int]) -> list[int]:
    """Returns a seed for each seed, other than it and than those of other purposes.

    Torch's generator on the CPU takes the last 32 bits of a seed, so adding a large number to one
    gives the same random numbers again.
    """
    name = zlib.crc32(purpose.encode())
    return [int(np.random.SeedSequence([name, s]).generate_state(1)[0]) for s in seeds]
