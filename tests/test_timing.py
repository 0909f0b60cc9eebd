"""Measuring what models take to load and to run."""

import time

import pytest
import torch
from torch import nn
from toys import toy_unet

from bf_lib.timing import loaded, medians_in_turns, unet_inputs


def test_runs_take_turns_and_their_medians_are_returned():
    order, waits = [], iter([0.0, 0.02, 0.2, 0.0, 0.02, 0.0])

    def run(name):
        order.append(name)
        time.sleep(next(waits))

    found = medians_in_turns({"a": lambda: run("a"), "b": lambda: run("b")}, repeats=3)
    assert order == ["a", "b"] * 3
    assert 0.02 <= found["a"] < 0.2, "it waits 0, .2 and .02 s"
    assert found["b"] < 0.02, "it waits .02, 0 and 0 s"


def test_what_is_done_at_the_end_of_a_run_belongs_to_it():
    found = medians_in_turns({"a": int}, repeats=2, done=lambda: time.sleep(0.03))
    assert found["a"] >= 0.03


def test_the_growth_is_that_of_the_model():
    module, seconds, grown = loaded(lambda: nn.Linear(4096, 8192))
    assert module.in_features == 4096 and seconds > 0
    assert grown == pytest.approx(4 * 4096 * 8192, rel=0.2)


def test_inputs_are_those_of_a_guided_step_and_always_the_same():
    unet = toy_unet()
    x, text = unet_inputs(unet, 8)
    assert unet(x, 5, encoder_hidden_states=text).sample.shape == x.shape == (2, 4, 8, 8)
    assert all(map(torch.equal, (x, text), unet_inputs(unet, 8)))
