"""Jobs on a Dask cluster: whatever scheduler there is an address of (extra `cluster`).

That is a `LocalCluster`, `dask scheduler` by hand, SLURM through dask-jobqueue, or Kubernetes
through dask-kubernetes. Nothing is shared but the scheduler: the workers load the model by its
name or folder, and say so when it, the code, the libraries or the kind of device differ from the
client's. A worker takes the first GPU that it sees: give each its own (`CUDA_VISIBLE_DEVICES`, or
dask-cuda). The scheduler gives the tasks of a worker that is lost to the others.
"""

__all__ = ["Cluster", "OtherRows"]

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from uuid import uuid4

import torch

from bf_lib.jobs import Bench, Job, Submit, Task, device_kind, header, scored
from bf_lib.processes import make_deterministic

try:
    import distributed
except ImportError as error:
    raise ImportError("a Dask cluster needs the extra: pip install 'bf_lib[cluster]'") from error


class OtherRows(RuntimeError):
    """A worker would give other rows than the client asks for."""


class Cluster:
    """The workers of a Dask scheduler."""

    def __init__(self, address: str) -> None:
        self.address = address

    def device_kind(self) -> str:
        """Returns the kind of device of a worker, whichever is there first.

        It is asked for by a task, because some clusters start their workers when there are tasks.
        """
        with distributed.Client(self.address, set_as_default=False) as client:
            return client.submit(_kind, key=("kind of device", uuid4().hex)).result()

    @contextmanager
    def sharing(self, job: Job, head: dict) -> Iterator[Submit]:
        """Yields what gives a task of a job to some worker; `head` is the header of its rows."""
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
        with distributed.Client(self.address, set_as_default=False) as client:
            executor = client.get_executor()

            def submit(task: Task) -> Future:
                kind, name = task.label  # the dashboard sums up and colours tasks by their kind
                return executor.submit(_score, job, head, task, key=(kind, name, digest))

            yield submit


_lock = threading.Lock()  # a worker may have several threads, which must not share a model
_open: tuple[dict, Bench] | None = None  # the job that this worker has a bench for


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _kind() -> str:
    return device_kind(_device())


def _score(job: Job, head: dict, task: Task) -> dict:
    """Returns the row of a task; the first one of a job loads its model."""
    global _open
    with _lock:
        make_deterministic(job.threads)  # each time: the number of threads is the thread's own
        if _open is None or _open[0] != head:
            _open = None  # frees the model of another job
            pipe = job.load(_device())
            _compare(header(job, pipe, {_kind()}), head)
            _open = head, job.bench(pipe)
        return scored(_open[1], task)


def _compare(ours: dict, wanted: dict) -> None:
    """Raises OtherRows when this worker's rows would belong to another header."""
    differing = [name for name in wanted if ours[name] != wanted[name]]
    if not differing:
        return
    said = [
        f"{name} {ours['versions'].get(name)} instead of {version}"
        for name, version in wanted["versions"].items()
        if ours["versions"].get(name) != version
    ]
    worker = distributed.get_worker().address
    raise OtherRows(
        f"worker {worker} differs from the client in {', '.join(differing)}"
        f"{': ' if said else ''}{', '.join(said)}; their rows would not be the same"
    )
