"""How processes are started, so that they can use a GPU; and which device is theirs."""

import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from accelerate import PartialState

from bf_lib.processes import USE_CPU, own_device, starter


def cuda_would_refuse() -> bool:
    """Whether CUDA, if there were any, would not work in this process."""
    return torch.cuda._is_in_bad_fork()


def test_where_there_is_a_gpu_processes_can_use_it(monkeypatch):
    """Those that are forked after diffusers was imported could not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ProcessPoolExecutor(1, starter("bf_lib.models")) as pool:
        assert pool.submit(cuda_would_refuse).result() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_one_they_are_forked_from_what_is_imported():
    wanted = "forkserver" if sys.platform == "linux" else "spawn"
    assert starter("bf_lib.models").get_start_method() == wanted


@pytest.fixture
def fresh(monkeypatch):
    """No device is chosen, neither before the test nor by it."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setenv(USE_CPU, "False")  # as `accelerate launch` sets it
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # as accelerate does for such a device
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_apples_device_is_not_taken(fresh):
    """Unlike what accelerate takes by itself."""
    assert own_device() == torch.device("cpu")


def test_accelerate_would_take_it(fresh):
    assert PartialState().device == torch.device("mps")
