"""How processes of a run are started, and what each sets up: device, arithmetic, its end."""

__all__ = ["USE_CPU", "end_with_parent", "make_deterministic", "own_device", "starter"]

import os
import sys
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from threading import Thread

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

USE_CPU = "ACCELERATE_USE_CPU"  # as accelerate calls it


def starter(*imported: str) -> BaseContext:
    """Returns what starts processes, the faster the more has been imported for all of them.

    On Linux they are forked from one that has only imported what takes seconds; but not where
    there is a GPU, for which diffusers asks on import: CUDA refuses to work in forks after that.

    Arguments:
        imported: The modules that all of them need.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([*imported])
    return context


def own_device() -> torch.device:
    """Returns the device of this process: its CUDA device, or the CPU.

    Also where `accelerate` by itself would take another kind, such as Apple's, on which nothing
    here was tried.
    """
    if not torch.cuda.is_available():
        os.environ[USE_CPU] = "true"
    return PartialState(cpu=parse_flag_from_env(USE_CPU)).device


def make_deterministic(threads: int) -> None:
    """Makes torch choose the same algorithms, in the same order of sums, at each run.

    Arguments:
        threads: How many threads this process computes with, which decides the order.
    """
    # Read by cuBLAS when it starts; without it, torch refuses deterministic products on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(threads)


def end_with_parent() -> None:
    """Ends this process when its parent is killed, instead of waiting for work for ever."""
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)
