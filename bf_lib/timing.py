"""What models take to load and to run, measured side by side in one process."""

__all__ = ["loaded", "medians_in_turns", "unet_inputs"]

import gc
import time
from collections.abc import Callable, Mapping
from itertools import chain
from statistics import median

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor


def medians_in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, done: Callable[[], object] = int
) -> dict[str, float]:
    """Returns the median seconds of each of several runs, which take turns.

    So a machine that slows down slows all of them.

    Arguments:
        runs: By name.
        repeats: Of each.
        done: Is called at the end of a run, before the clock is read; on a GPU, a `synchronize`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            done()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def loaded(
    load: Callable[[], UNet2DConditionModel],
) -> tuple[UNet2DConditionModel, float, int]:
    """Loads a UNet; returns it, the seconds, and the bytes by which the process grew."""
    torch.zeros(64, 64) @ torch.zeros(64, 64)  # what torch sets up at first use
    gc.collect()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    unet = load()
    seconds = time.perf_counter() - started
    for tensor in chain(unet.parameters(), unet.buffers()):
        _touch(tensor)
    gc.collect()
    return unet, seconds, process.memory_info().rss - before


def _touch(tensor: Tensor) -> None:
    """Reads a byte of each page of a tensor: of a mapped file, only what is read is in memory."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            _touch(getattr(tensor, part))
    else:
        storage = tensor.detach().untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage)[::1024].sum()


def unet_inputs(unet: UNet2DConditionModel, latents: int) -> tuple[Tensor, Tensor]:
    """Returns noise and text of one guided step, the same in each process; 77 tokens, SD-v1.5's.

    Arguments:
        unet: Whose widths they have.
        latents: The width and height of the noise.

    Returns:
        Latents with shape (2, channels, latents, latents) and text with shape (2, 77, width).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, latents, latents, generator=generator)
    return x, torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
