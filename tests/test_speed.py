"""The benchmark of the sweep: what it counts, and that a process that fails is not waited for."""

from dataclasses import replace

import pandas as pd
import pytest

from bf_lib.sampling import Sampler
from bf_lib.sensitivity import Sweep
from bf_lib.speed import measure, scale_seconds, summary

SWEEP = Sweep(
    model="mini",
    prompts=("a red star",),
    seeds=(0,),
    sampler=Sampler(steps=1, guidance=2.0, batch=1),
    bits=(1,),
    layers=("mid_block.resnets.0.conv1",),
)


def test_every_layout_takes_its_turn_in_every_round():
    table = measure(SWEEP, rounds=2, layouts=((1, 1), (1, 2)))
    counts = table.groupby(["processes", "threads", "work"])["round"].agg(list)
    assert counts.to_dict() == {
        (1, threads, work): [1, 2] for threads in (1, 2) for work in ("bare loop", "sweep")
    }
    assert (table.evaluations_per_second > 0).all()


def test_the_share_is_the_median_of_the_ratios_of_rounds():
    rows = [
        (turn, 2, 1, work, rate)
        for turn, rates in enumerate([(100, 90), (10, 8), (50, 50)])
        for work, rate in zip(("bare loop", "sweep"), rates, strict=True)
    ]
    columns = ["round", "processes", "threads", "work", "evaluations_per_second"]
    found = summary(pd.DataFrame(rows, columns=columns)).loc[(2, 1)]
    assert found["bare loop"] == 50
    assert found["sweep"] == 50
    assert found["sweep / bare loop"] == pytest.approx(0.9)


def test_the_search_for_scales_is_timed_on_all_weights():
    count, seconds = scale_seconds([((4, 3, 3, 3), 3), ((5, 20), 9)], threads=1)
    assert count == 4 * 27 + 100
    assert seconds > 0


def test_a_process_that_fails_ends_the_benchmark():
    with pytest.raises(EOFError):
        measure(replace(SWEEP, metrics="no such metrics"), rounds=1, layouts=((1, 1),))
    with pytest.raises(ValueError, match="needs a process"):
        measure(SWEEP, rounds=1, layouts=((0, 1),))
