"""Jobs on a Dask cluster of real processes: the same rows, whatever becomes of a worker."""

import json
import os
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil
import pytest
from dask.utils import key_split
from distributed import LocalCluster
from test_sensitivity import SWEEP, by_candidate, is_alive

from bf_lib import cluster as clusters
from bf_lib import jobs
from bf_lib.cluster import OtherRows
from bf_lib.jobs import header, run_job
from bf_lib.sampling import Sampler
from bf_lib.sensitivity import Candidate, Estimate, Sweep


@dataclass(frozen=True)
class Counted(Sweep):
    """A sweep that notes which process loads its model."""

    log: str = ""

    def load(self, device):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().load(device)


@pytest.fixture(scope="module")
def cluster():
    # Two threads each: a worker must not lend its model to two tasks at once.
    options = {"threads_per_worker": 2, "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=2, processes=True, **options) as started:
        yield started


def counted(log: Path, **changes: object) -> Counted:
    settings = {field.name: getattr(SWEEP, field.name) for field in fields(SWEEP)}
    return Counted(**settings | changes, log=str(log))


def test_a_worker_may_be_killed_in_the_middle(cluster, tmp_path):
    sweep = counted(tmp_path / "loads", bits=(1, 2, 3))
    serial = by_candidate(run_job(sweep, tmp_path / "serial"))
    (tmp_path / "loads").unlink()

    running = run_job(sweep, tmp_path / "shared", cluster=cluster.scheduler_address)
    rows = [next(running)]
    # What the dashboard shows: the kinds of tasks, and the layer of each.
    keys = list(cluster.scheduler.tasks)
    assert {key_split(key) for key in keys} <= {"full precision", "1 bit", "2 bit", "3 bit"}
    assert {key[1] for key in keys} <= {"", *SWEEP.layers}
    loaded = [int(pid) for pid in (tmp_path / "loads").read_text().split()]
    victim = psutil.Process(next(pid for pid in loaded if pid != os.getpid()))
    victim.kill()
    rows += running

    assert not is_alive(victim)
    assert by_candidate(rows) == serial
    assert len(rows) == len(serial) == 7
    (path,) = (tmp_path / "shared").glob("*.jsonl")
    kept = [json.loads(line) for line in path.read_text().split("\n")[1:]]
    assert by_candidate(kept) == serial
    loads = Counter(int(pid) for pid in (tmp_path / "loads").read_text().split())
    assert set(loads.values()) == {1}, "each process loads the model once"


def test_a_worker_with_other_code_is_refused(cluster, tmp_path, monkeypatch):
    """As if the client had another version of a library than the workers have."""
    known = jobs.versions()
    monkeypatch.setattr(jobs, "versions", lambda: known | {"torch": "0.1"})
    small = replace(SWEEP, layers=SWEEP.layers[:1], bits=(1,))
    with pytest.raises(OtherRows, match="differs from the client in versions: torch .* instead"):
        list(run_job(small, tmp_path, cluster=cluster.scheduler_address))


def test_an_estimate_runs_on_a_cluster(cluster, tmp_path):
    sampler = Sampler(steps=1, guidance=2.0, batch=1)
    job = Estimate("mini", SWEEP.prompts, SWEEP.seeds, sampler, layers=SWEEP.layers)
    serial = list(run_job(job, tmp_path / "serial"))
    shared = list(run_job(job, tmp_path / "shared", cluster=cluster.scheduler_address))
    wanted, found = ({row["start"]: row["errors"] for row in rows} for rows in (serial, shared))
    assert found == wanted and len(found) == 2


def test_another_job_replaces_the_model_of_a_worker(monkeypatch, tmp_path):
    """Run in this process, as a worker would."""
    monkeypatch.setattr(clusters, "_open", None)
    monkeypatch.setattr(clusters, "make_deterministic", lambda threads: None)
    loads = []

    def load(self, device):
        loads.append(self.bits)
        return original(self, device)

    original = Sweep.load
    monkeypatch.setattr(Sweep, "load", load)
    small = replace(SWEEP, layers=SWEEP.layers[:1], bits=(1,))
    other = replace(small, bits=(2,))
    heads = [header(job, original(job, "cpu"), {clusters._kind()}) for job in (small, other)]
    task = Candidate(SWEEP.layers[0], 1)
    first = clusters._score(small, heads[0], task)
    assert clusters._score(small, heads[0], task) == first
    clusters._score(other, heads[1], Candidate(SWEEP.layers[0], 2))
    assert loads == [(1,), (2,)]
