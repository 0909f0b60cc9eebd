"""What each process of a run sets up: reproducible arithmetic, and an end with its parent."""

__all__ = ["end_with_parent", "make_deterministic"]

import os
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread

import torch


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
