"""Exams of packed UNets: the same rows as trials of their recipes, and no other UNet's rows."""

from dataclasses import replace

import pytest
import torch
from test_trials import ASKED, SIX

from bf_lib.exams import Exam, Student
from bf_lib.layers import list_layers
from bf_lib.models import load_pipeline
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import pack_
from bf_lib.timecache import sampling_steps
from bf_lib.trials import FULL, difference, trial_table


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("mini")


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    """`mini` packed at 3 and at 17 levels."""
    found = {}
    steps = sampling_steps(pipe.scheduler, SIX.sampler.steps)
    for levels in (3, 17):
        unet = load_pipeline("mini").unet
        recipe = {layer.name: levels for layer in list_layers(unet)}
        pack_(unet, BitsFusionConfig(recipe, timesteps=steps))
        found[levels] = tmp_path_factory.mktemp(f"levels{levels}")
        unet.save_pretrained(found[levels])
    return found


@pytest.fixture
def exam(folders):
    students = tuple(Student.of(f"{n} levels", folder) for n, folder in folders.items())
    return Exam(SIX, (), ASKED, students)


def test_students_are_judged_beside_full_precision(exam, pipe):
    unet = pipe.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    bench = exam.bench(pipe)
    tasks = exam.tasks(unet)
    assert [task.name for task in tasks] == [FULL, "3 levels", "17 levels"]
    rows = [bench.score(task) for task in tasks]
    table = trial_table(rows, [task.name for task in tasks]).set_index("name")
    assert table.mse[FULL] == 0 and table.mse["3 levels"] > table.mse["17 levels"] > 0
    assert all(len(row["passed"]) == 6 for row in rows)
    found = difference(rows, "17 levels", FULL, "clip")
    assert found["low"] <= found["value"] <= found["high"]
    assert pipe.unet is unet
    assert all(torch.equal(v, before[name]) for name, v in unet.state_dict().items())


def test_a_folder_that_was_changed_is_not_examined(exam, pipe):
    bench = exam.bench(pipe)
    with pytest.raises(ValueError, match="was changed"):
        bench.score(replace(exam.students[0], digest="0" * 16))
    assert bench.score(Student(FULL))["mse"] == [0.0] * 6


def test_names_are_not_given_twice(exam):
    with pytest.raises(ValueError, match="names of their own"):
        replace(exam, students=(exam.students[0], exam.students[0]))
    with pytest.raises(ValueError, match="names of their own"):
        replace(exam, students=(Student(FULL),))
