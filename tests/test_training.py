"""The training loop: the same result after a kill, and nothing kept of another training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from bf_lib import training
from bf_lib.paths import ROOT
from bf_lib.training import Plan, fit
from bf_lib.training_state import TrainingState, load_ema

PLAN = Plan(steps=60, batch=8, lr=0.2, warmup=5, ema=0.9, weight_decay=0.0, save_every=20)


class Line:
    """Fits y = slope x + 1; `wait` seconds a step, an infinite loss from step `breaks` on."""

    def __init__(self, slope: float = 3.0, wait: float = 0.0, breaks: int | None = None) -> None:
        self.model = nn.Linear(1, 1)
        self.slope, self.wait, self.breaks = slope, wait, breaks

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        time.sleep(self.wait)
        x = torch.randn(size, 1, generator=generator)
        loss = (self.model(x) - self.slope * x - 1).square().mean()
        if self.breaks is not None and step >= self.breaks:
            loss = loss * torch.inf
        return {"loss": loss, "size": torch.tensor(float(size))}


class LineThroughZero(Line):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(Line, PLAN, folder)
    return folder


def test_it_learns_and_the_average_is_loaded(whole):
    model = load_ema(nn.Linear(1, 1), whole)
    assert model.weight.item() == pytest.approx(3, abs=0.2)
    assert model.bias.item() == pytest.approx(1, abs=0.2)
    log = pd.read_csv(whole / "log.csv")
    assert log.step.tolist() == [20, 40, 60]
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert (log["size"] == 4).all()  # of each process
    np.testing.assert_allclose(log.lr, [PLAN.rate(step - 1) for step in log.step])


def test_a_killed_training_ends_with_the_same_weights(whole, tmp_path):
    program = f"""
if __name__ == "__main__":
    from functools import partial
    from pathlib import Path
    from test_training import PLAN, Line
    from bf_lib.training import fit
    fit(partial(Line, wait=0.1), PLAN, Path({str(tmp_path)!r}))
"""
    (tmp_path / "train.py").write_text(program)
    places = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py")],
        env=os.environ | {"PYTHONPATH": places},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "checkpoint.safetensors"
    until = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    assert not torch.equal(saved(tmp_path)["now/weight"], saved(whole)["now/weight"])

    fit(Line, PLAN, tmp_path)  # the wait is not part of what a training is known by
    resumed, uninterrupted = saved(tmp_path), saved(whole)
    assert resumed.keys() == uninterrupted.keys()
    for name, value in resumed.items():
        assert torch.equal(value, uninterrupted[name]), name
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "log.csv").drop(columns="seconds_per_step"),
        pd.read_csv(whole / "log.csv").drop(columns="seconds_per_step"),
    )


def test_a_finished_training_is_not_repeated(whole):
    before = (whole / "checkpoint.safetensors").stat().st_mtime_ns
    fit(Line, PLAN, whole)
    assert (whole / "checkpoint.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("make", "plan"),
    [(partial(Line, slope=-2.0), PLAN), (Line, replace(PLAN, lr=0.1)), (LineThroughZero, PLAN)],
    ids=["another task", "another plan", "another model"],
)
def test_another_training_starts_over(make, plan, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "changed")
    fit(make, plan, tmp_path / "changed")
    fit(make, plan, tmp_path / "fresh")
    changed, fresh = saved(tmp_path / "changed"), saved(tmp_path / "fresh")
    assert changed.keys() == fresh.keys()
    assert all(torch.equal(changed[name], fresh[name]) for name in fresh)
    assert pd.read_csv(tmp_path / "changed" / "log.csv").step.tolist() == [20, 40, 60]
    replaced = load_file(tmp_path / "changed" / "replaced.safetensors")
    assert all(torch.equal(value, replaced[name]) for name, value in saved(whole).items())


def test_another_number_of_processes_is_another_training(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "one")
    fit(Line, PLAN, tmp_path / "one", processes=1)
    assert not torch.equal(saved(tmp_path / "one")["now/weight"], saved(whole)["now/weight"])


def test_the_last_digits_of_another_processor_start_nothing_over(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "checkpoint.safetensors"
    with safe_open(checkpoint, "pt") as file:
        state = json.loads(file.metadata()["state"])
    state["untrained"]["loss"] *= 1 + 1e-6
    save_file(saved(whole), checkpoint, {"state": json.dumps(state)})
    before = checkpoint.stat().st_mtime_ns
    fit(Line, PLAN, tmp_path / "moved")
    assert checkpoint.stat().st_mtime_ns == before


def test_the_last_steps_are_logged_though_they_are_few(tmp_path):
    fit(Line, replace(PLAN, steps=25), tmp_path, processes=1)
    assert pd.read_csv(tmp_path / "log.csv").step.tolist() == [20, 25]


def test_gradients_are_averaged_over_processes(tmp_path):
    """Two that have half of a batch each learn what one learns that has all of it."""
    fit(Shared, PLAN, tmp_path / "one", processes=1)
    fit(Shared, PLAN, tmp_path / "two", processes=2)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name])


class Shared(Line):
    """Of a batch that is the same for any number of processes, each has its part."""

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        world, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
        whole = torch.randn(world * size, 1, generator=torch.Generator().manual_seed(step))
        x = whole[rank * size : (rank + 1) * size]
        return {"loss": (self.model(x) - self.slope * x - 1).square().mean()}


class Same(Line):
    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return super().loss(step, size, torch.Generator().manual_seed(step))


class Noting(Line):
    """Writes down what it draws, but for the losses before training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.calls = folder, 0

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.calls:
            drawn = torch.randn(size, generator=generator.clone_state()).tolist()
            with (self.folder / f"{os.getpid()}.txt").open("a") as file:
                file.write(" ".join(map(str, drawn)) + "\n")
        self.calls += 1
        return super().loss(step, size, generator)


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    """On the same data, the gradient of four parts is that of one."""
    fit(Same, replace(PLAN, batch=4), tmp_path / "one", processes=1)
    fit(Same, replace(PLAN, batch=16, accumulate=4), tmp_path / "four", processes=1)
    one, four = saved(tmp_path / "one"), saved(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name])


def test_seeds_processes_and_steps_draw_other_numbers(tmp_path):
    plan = replace(PLAN, steps=3, accumulate=4)  # two parts for each of two processes
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        fit(partial(Noting, folder), replace(plan, seed=seed), folder, processes=2)
        assert len(list(folder.glob("*.txt"))) == 2
    files = tmp_path.glob("*/*.txt")
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3 * 2 and {len(line) for line in lines} == {2}
    assert len({number for line in lines for number in line}) == 2 * 2 * 3 * 4


def test_processes_share_the_parts_of_a_batch():
    plan = replace(PLAN, batch=256, accumulate=64)
    assert [plan.shares(n) for n in (1, 8, 64, 256)] == [(64, 4), (8, 4), (1, 4), (1, 1)]


def test_gpus_that_cannot_share_a_batch_are_left_out(monkeypatch, tmp_path):
    plan = replace(PLAN, batch=256, accumulate=64)
    assert [plan.largest(n) for n in (1, 3, 8, 12, 300)] == [1, 2, 8, 8, 256]
    assert replace(PLAN, batch=2, accumulate=3).largest(1) == 1  # which `shares` refuses

    started = []
    monkeypatch.setattr(training.mp, "start_processes", lambda *a, **k: started.append((a[1], k)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fit(Line, replace(PLAN, batch=8), tmp_path)
    fit(Line, replace(PLAN, batch=8), tmp_path, cpu=True)
    (on_gpus, how), (on_cpus, _) = started
    assert (on_gpus[0], on_cpus[0]) == (4, 2)
    assert (on_gpus[3], on_cpus[3]) == (False, True)  # whether on the CPU
    assert how["start_method"] == "spawn"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes need a CUDA device each; there are 1"):
        fit(Line, replace(PLAN, batch=8), tmp_path, processes=2)
    assert len(started) == 2  # nothing was started


def test_a_process_without_a_checkpoint_keeps_no_other_waiting(whole, tmp_path):
    """All must take part in what decides whether to go on, of machines that share no folder."""
    model = nn.Linear(1, 1)
    names, params = zip(*model.named_parameters(), strict=True)
    asked = []

    def reduce(value: torch.Tensor, how: str) -> torch.Tensor:
        asked.append((float(value), how))
        return value

    for folder in (tmp_path, whole):
        state = TrainingState(folder, {"plan": {}, "untrained": {}}, names, params, [], None)
        assert state.restore(reduce) == 0
    assert asked == [(0.0, "mean")] * 2


def test_a_script_can_be_launched(tmp_path):
    """Two processes that torchrun starts, as `accelerate launch` does, learn what `fit`'s do."""
    program = f"""
from pathlib import Path
from test_training import PLAN, Line
from bf_lib.training import train
train(Line, PLAN, Path({str(tmp_path / "launched")!r}))
"""
    (tmp_path / "script.py").write_text(program)
    places = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, str(tmp_path / "script.py")],
        env=os.environ | {"PYTHONPATH": places, "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )
    fit(Line, PLAN, tmp_path / "fitted", processes=2)
    launched, fitted = saved(tmp_path / "launched"), saved(tmp_path / "fitted")
    assert launched.keys() == fitted.keys()
    assert all(torch.equal(launched[name], fitted[name]) for name in fitted)


class Dropping(Line):
    """Draws from torch's own generator, as dropout does; dies at step 30, once."""

    def __init__(self, marked: Path | None = None) -> None:
        super().__init__()
        self.marked = marked

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 30 and self.marked and not self.marked.exists():
            self.marked.touch()
            raise RuntimeError("killed")
        found = super().loss(step, size, generator)
        return found | {"loss": found["loss"] * (0.5 + torch.rand(()))}


def test_what_dropout_draws_is_the_same_after_a_kill(tmp_path):
    fit(Dropping, PLAN, tmp_path / "whole", processes=1)
    killed = partial(Dropping, tmp_path / "marked")
    with pytest.raises(ProcessRaisedException, match="killed"):
        fit(killed, PLAN, tmp_path / "killed", processes=1)
    fit(killed, PLAN, tmp_path / "killed", processes=1)
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Unused(Line):
    """Has a parameter that nothing is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.model.spare = nn.Parameter(torch.zeros(1))


def test_a_parameter_that_is_not_used_is_named(tmp_path):
    with pytest.raises(ProcessRaisedException, match=r"does not depend on \['spare'\]"):
        fit(Unused, PLAN, tmp_path, processes=1)


class Called(Line):
    """Says what it is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.identity = {"name": name}


def test_a_task_that_says_it_is_another_starts_over(tmp_path):
    for name, replaced in (("one", False), ("one", False), ("other", True)):
        fit(partial(Called, name), PLAN, tmp_path, processes=1)
        assert (tmp_path / "replaced.safetensors").exists() is replaced


def test_an_infinite_loss_stops_with_the_last_checkpoint_whole(tmp_path):
    with pytest.raises(ProcessRaisedException, match="not finite at step 30"):
        fit(partial(Line, breaks=30), PLAN, tmp_path, processes=1)
    assert all(torch.isfinite(value).all() for value in saved(tmp_path).values())


class Deep(Line):
    """Three layers, of which the one in the middle breaks at step 30, or whose gradient does."""

    def __init__(self, backward: bool = False) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        self.backward = backward

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 30 and self.backward:
            self.model[1].weight.register_hook(lambda grad: grad * torch.nan)
        elif step == 30:
            self.model[1].bias.data[0] = torch.inf
        return super().loss(step, size, generator)


@pytest.mark.parametrize(
    ("backward", "said"),
    [
        (False, "the first that is not is the output of 1$"),
        (True, "not the gradients of 1.weight$"),
    ],
)
def test_the_layer_at_fault_is_named(backward, said, tmp_path):
    with pytest.raises(ProcessRaisedException, match=rf"(?m)not finite at step 30: .*{said}"):
        fit(partial(Deep, backward), PLAN, tmp_path, processes=1)


class Frozen(Line):
    """Only the slope is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model.bias.requires_grad_(False).fill_(1.0)


def test_only_what_requires_gradients_is_trained_and_saved(tmp_path):
    fit(Frozen, PLAN, tmp_path, processes=1)
    assert {name for name in saved(tmp_path) if "bias" in name} == set()
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    assert load_ema(model, tmp_path).weight.item() == pytest.approx(3, abs=0.2)


def test_parameters_can_have_rates_of_their_own(tmp_path):
    """Adam's first steps are as long as the rate, whatever the gradient."""
    plan = replace(PLAN, steps=1, warmup=1, decay=0.0, rates=(("bias", 0.1),))
    fit(Line, plan, tmp_path, processes=1)
    torch.manual_seed(plan.seed)
    start, found = Line().model, saved(tmp_path)
    assert (found["now/weight"] - start.weight).abs().item() == pytest.approx(0.2, rel=1e-3)
    assert (found["now/bias"] - start.bias).abs().item() == pytest.approx(0.02, rel=1e-3)


def test_the_rate_rises_stays_and_falls():
    plan = Plan(steps=100, batch=2, lr=1.0, warmup=10, decay=0.5)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert np.diff(rates[50:]) == pytest.approx(-0.02)
    assert rates[-1] == pytest.approx(0.02)


def test_impossible_plans_and_missing_weights_are_refused(whole, tmp_path):
    wrong_values = {"steps": 0, "batch": 0, "decay": 1.5, "ema": 1.0, "save_every": 30, "lr": -1.0}
    for wrong in ({name: value} for name, value in wrong_values.items()):
        with pytest.raises(ValueError, match="impossible training plan"):
            replace(PLAN, **wrong)
    with pytest.raises(ValueError, match="batch of 3 cannot be shared by 2 processes"):
        fit(Line, replace(PLAN, batch=3), tmp_path)
    with pytest.raises(ValueError, match="plan: lr=-1.0, precision='fp16'$"):
        replace(PLAN, lr=-1.0, precision="fp16")
    with pytest.raises(ValueError, match="holds no weights"):
        load_ema(nn.Sequential(nn.Linear(1, 1)), whole)
    with pytest.raises(ValueError, match="weights of another model: \\['bias'\\]"):
        load_ema(nn.Linear(1, 1, bias=False), whole)
