"""Jobs: tasks that processes share, on this machine or on a cluster, with one row of results each.

A job says all that its rows depend on, and every process works alike on one model of its own with
a fixed number of threads. So any number of processes gives the same rows, and a row that is lost
with its process is computed again. A row is written as soon as it is there, to a file that is
named after everything that the row depends on: a job that was killed goes on from its rows, and
a job that differs in anything has a file of its own.
"""

__all__ = ["Bench", "Job", "Task", "TaskFailed", "run_job"]

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Protocol

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from bf_lib.atomic import append_line, write_atomically
from bf_lib.models import fingerprint
from bf_lib.processes import end_with_parent, make_deterministic, starter
from bf_lib.provenance import imported_files, library_digest, versions

Submit = Callable[["Task"], Future]  # gives a task to some process


class Task(Protocol):
    """One piece of work: a frozen dataclass, whose fields begin its row."""

    @property
    def label(self) -> tuple[str, str]:
        """What to call it: a kind that many share, and the rest."""


class Bench(Protocol):
    """What a process works with: a loaded model and all that is prepared once."""

    def score(self, task: Task) -> dict:
        """Returns the row of a task: its fields, then what was found.

        Raises:
            ValueError: If this task has no result; the others are still done.
        """


class Job(Protocol):
    """All that rows depend on: a frozen dataclass, sent to each process that works on it."""

    threads: int  # of each process

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model to a device."""

    def judges(self) -> list[nn.Module]:
        """Loads the other networks that rows depend on."""

    def tasks(self, unet: nn.Module) -> list[Task]:
        """Lists the tasks, in the order in which they are begun."""

    def bench(self, pipe: StableDiffusionPipeline) -> Bench:
        """Returns what a process works with."""


class TaskFailed(ValueError):
    """Tasks have no result, as when a weight or an image is NaN or infinite."""


def run_job(
    job: Job,
    folder: Path,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    cluster: str | None = None,
) -> Iterator[dict]:
    """Yields the row of each task, those on file first and the others as they are finished.

    Arguments:
        job: What to do.
        folder: Where the rows are kept, in a file of the job's own.
        workers: How many processes share the tasks; by default one for each device.
        devices: The devices of the processes, taken in turn; by default the GPUs, or the CPU.
        cluster: The address of a Dask scheduler whose workers do the work instead, with one of
            the devices that each sees; `workers` and `devices` are then up to the cluster.

    Raises:
        TaskFailed: If tasks have no result; all others are on file by then.
    """
    if cluster is None:
        devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        with_workers, kinds = None, {device_kind(device) for device in devices}
    else:
        from bf_lib.cluster import Cluster  # an optional extra

        with_workers = Cluster(cluster)
        kinds = {with_workers.device_kind()}
    pipe = job.load("cpu")
    tasks = job.tasks(pipe.unet)
    head = header(job, pipe, kinds)
    del pipe
    path = _row_file(folder, head)
    if not path.exists():
        write_atomically(path, json.dumps(head).encode())
    rows = _rows(path, tasks)
    yield from rows.values()
    if todo := [task for task in tasks if _key(task) not in rows]:
        if with_workers is None:
            count = min(workers or len(devices), len(todo))
            sharing = _processes(job, [devices[i % len(devices)] for i in range(count)])
        else:
            sharing = with_workers.sharing(job, head)
        yield from _share(todo, path, sharing)


def _share(
    todo: Sequence[Task], path: Path, sharing: AbstractContextManager[Submit]
) -> Iterator[dict]:
    """Yields rows as they are finished; each goes to file, asked for or not."""
    failed: list[str] = []
    unwritten: list[Exception] = []

    def keep(future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            try:
                append_line(path, json.dumps(future.result()))
            except Exception as error:  # raised here, it would only be logged
                unwritten.append(error)

    with sharing as submit:
        futures = [submit(task) for task in todo]
        for future in futures:
            future.add_done_callback(keep)
        for future in as_completed(futures):
            try:
                row = future.result()
            except TaskFailed as error:
                failed.append(str(error))
                continue
            if unwritten:
                break
            yield row
    if unwritten:
        raise unwritten[0]
    if failed:
        raise TaskFailed(
            "\n".join([f"{len(failed)} of {len(todo)} tasks failed:", *sorted(failed)])
        )


def scored(bench: Bench, task: Task) -> dict:
    """Returns the row of a task, or says which task failed."""
    try:
        return bench.score(task)
    except ValueError as error:
        raise TaskFailed(f"{' '.join(task.label).strip()}: {error}") from error


# ---- processes of this machine


_bench: Bench | Exception | None = None  # of this process, or why it has none


def _start(job: Job, devices: Queue) -> None:
    """Prepares a process of the pool: threads, then the model and all that goes with it."""
    global _bench
    end_with_parent()
    make_deterministic(job.threads)
    try:
        _bench = job.bench(job.load(devices.get()))
    except Exception as error:  # raised here, all that is seen is a broken pool
        _bench = error


def _score(task: Task) -> dict:
    if isinstance(_bench, Exception):
        raise _bench
    return scored(_bench, task)


@contextmanager
def _processes(job: Job, devices: Sequence[str]) -> Iterator[Submit]:
    """Starts a process for each of the devices."""
    context = starter(__name__, type(job).__module__)
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    pool = ProcessPoolExecutor(len(devices), context, _start, (job, queue))
    try:
        yield lambda task: pool.submit(_score, task)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- rows on file


def device_kind(device: str) -> str:
    """Returns what decides, beside the code, how a device rounds its sums."""
    if device.startswith("cuda"):
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device}: {torch.backends.cpu.get_cpu_capability()}"


def header(job: Job, pipe: StableDiffusionPipeline, kinds: set[str]) -> dict:
    """Says what rows belong to: settings, models, code, libraries and kind of device."""
    found = {
        "job": {"kind": type(job).__name__} | asdict(job),
        "models": fingerprint([*pipe.components.values(), *job.judges()]),
        "code": library_digest(imported_files(Path(inspect.getfile(type(job))))),
        "versions": versions(),
        "devices": sorted(kinds),
    }
    return json.loads(json.dumps(found))  # tuples become lists


def _row_file(folder: Path, head: dict) -> Path:
    """Returns the file of a job's rows: JSON lines, the first of them the header.

    Its name is a digest of the header, so that rows of two jobs cannot meet in one file.
    """
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
    return folder / f"rows-{digest[:16]}.jsonl"


def _key(task: Task) -> tuple:
    return tuple(asdict(task).values())


def _rows(path: Path, tasks: Sequence[Task]) -> dict[tuple, dict]:
    """Returns the rows on file by task, without those that a kill left incomplete."""
    names = [field.name for field in fields(tasks[0])] if tasks else []
    parsed = [_parsed(line) for line in path.read_text().split("\n")[1:]]
    return {tuple(row[name] for name in names): row for row in parsed if row is not None}


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
