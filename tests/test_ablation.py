"""The ablation: files of finished rows, what is left, and rows of other settings."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lessons import RECIPES
from safetensors.torch import load_file

from bf_lib.ablation import SETTINGS, ship
from bf_lib.ablation_rows import ONE_SEED, ablation_rows, result_rows
from bf_lib.ablation_study import finished, row_table
from bf_lib.curriculum import Row, Stage
from bf_lib.examples import Examples
from bf_lib.forms import Form, as_stored
from bf_lib.layers import list_layers
from bf_lib.models import load_pipeline
from bf_lib.noising import predicted
from bf_lib.packed_unets import load_packed, pack_student
from bf_lib.paths import ROOT
from bf_lib.recipe import Recipe
from bf_lib.row_teaching import (
    RowsFailed,
    examples_of,
    held_out_error,
    held_out_of,
    reference_images,
    teach_rows,
)
from bf_lib.sampling import generate
from bf_lib.student import quantize
from bf_lib.study import Study
from bf_lib.taught_rows import Ablation, effort_of, exam_of, record_of, state_of
from bf_lib.teaching import Teaching
from bf_lib.times import uniform
from bf_lib.training_data import HELD_OUT


@pytest.fixture(scope="module")
def unet():
    return load_pipeline("mini").unet


@pytest.fixture(scope="module")
def nine(unet):
    return Form(levels=tuple((layer.name, 9) for layer in list_layers(unet)))


@pytest.fixture(scope="module")
def run(tmp_path_factory, nine):
    """Rows that two processes finished, and folders of stages that were kept after each."""
    folder = tmp_path_factory.mktemp("ablation")
    first, second = Stage(), Stage(objective="noise", fine_tuning=True)
    row = partial(Row, form=nine, seeds=(0,))
    rows = (
        row(name="not trained", group="control"),
        row(name="Stage I", group="paper", stages=(first,)),
        row(name="palettes", group="baseline", form=Form(kind="palette"), stages=(first,)),
        row(name="+ Stage II", group="paper", stages=(first, second)),
    )
    wild = row(name="wild", group="control", stages=(first,), changed=(("lr", 1e30),))
    made = Ablation(SETTINGS["smoke"], rows, folder / "rows", folder / "work")
    assert set(made.table().state) == {"left"}
    kept = {}
    with pytest.raises(RowsFailed, match=r"wild, seed 0: .*(NaN|finite)"):
        for done, _, _ in teach_rows(replace(made, rows=(*rows, wild)), workers=2):
            kept[done.name] = {path.name for path in made.work.glob("stage*") if path.is_dir()}
    assert state_of(made, wild, 0) == "left"  # which stopped no other
    return made, kept


@pytest.fixture(scope="module")
def small(run):
    """The rows."""
    return run[0]


def test_the_images_of_full_precision_are_drawn_once_for_all(run):
    made, _ = run
    (file,) = made.work.glob("reference-*")
    assert reference_images(made) == file
    sweep = exam_of(made.setting).sweep
    drawn = generate(load_pipeline("mini"), sweep.prompts, sweep.seeds, sweep.sampler)
    kept = load_file(file)["images"]
    assert kept.shape == drawn.shape
    assert (kept.int() - drawn.int()).abs().max() <= 1  # threads of this process may be others


def test_finished_rows_are_files_and_are_not_repeated(small):
    assert set(small.table().state) == {"done"}
    files = {file.name: file.stat().st_mtime_ns for file in small.folder.iterdir()}
    assert sorted(files) == [
        "baseline--palettes--0.json",
        "control--not-trained--0.json",
        "paper--stage-i--0.json",
        "paper--stage-ii--0.json",
    ]
    assert list(teach_rows(small)) == []
    assert files == {file.name: file.stat().st_mtime_ns for file in small.folder.iterdir()}


def test_rows_hold_what_was_found_for_each_prompt(small):
    for row in small.rows:
        record = record_of(small, row, 0)
        found = record["found"]
        assert len(record["losses"]) == len(row.stages)
        assert all({"step", "loss", "noise"} <= losses.keys() for losses in record["losses"])
        assert all(len(found[score]) == 6 for score in ("mse", "clip", "passed", "perceptual"))
        assert np.isfinite(found["mse"]).all() and min(found["mse"]) > 0
        assert 0 < record["paper_bits"] < record["stored_bits"] < 5
        assert (record["coded_bits"] is None) == (row.name == "palettes")
        if record["coded_bits"]:  # nine levels are not all alike
            assert 2 < record["coded_bits"] < record["stored_bits"]
        assert json.dumps(record["settings"]).count(",") < 200  # recipes are there by digest


def test_students_are_kept_packed_and_shipped(small, tmp_path):
    rows = {row.name: row for row in small.rows}
    ship(small, {"one": "Stage I", "two": "+ Stage II", "none": "palettes"}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for folder, name in (("one", "Stage I"), ("two", "+ Stage II")):
        stored = (tmp_path / folder / "diffusion_pytorch_model.safetensors").stat().st_size
        assert stored == round(record_of(small, rows[name], 0)["coded_mb"] * 1e6)
    sweep = exam_of(small.setting).sweep
    asked = sweep.prompts, sweep.seeds, sweep.sampler
    pipe, full = load_pipeline("mini"), load_file(reference_images(small))["images"].float()
    pipe.unet = load_packed(tmp_path / "two", "dense")
    mse = (generate(pipe, *asked).float() - full).square().flatten(1).mean(1)
    found = record_of(small, rows["+ Stage II"], 0)["found"]["mse"]
    assert mse.tolist() == pytest.approx(found, rel=0.05)


def test_rows_begin_with_the_same_first_stage(small, nine):
    first, both = small.rows[1], small.rows[3]
    assert small.stage_folder(first, 0, 0) == small.stage_folder(both, 0, 0)
    others = {
        small.stage_folder(both, 0, 1),
        small.stage_folder(both, 1, 0),
        small.stage_folder(replace(first, form=replace(nine, scales="minmax")), 0, 0),
        small.stage_folder(replace(first, stages=(Stage(dropped=0.0),)), 0, 0),
        replace(small, setting=replace(small.setting, lr=1e-3)).stage_folder(first, 0, 0),
    }
    assert len(others) == 5 and small.stage_folder(first, 0, 0) not in others


def test_checkpoints_are_kept_as_long_as_rows_need_them(run):
    made, kept = run
    both = next(row for row in made.rows if row.name == "+ Stage II")
    first, second = (made.stage_folder(both, 0, number).name for number in range(2))
    assert list(kept)[-1] == "+ Stage II"  # rows of one stage come first
    assert first in kept["Stage I"] and first not in kept["+ Stage II"]
    assert second not in kept["+ Stage II"]


def test_errors_on_held_out_scenes_are_those_of_noise_beside_the_teachers(small, unet, nine):
    assert held_out_error(small, copy.deepcopy(unet)) == 0
    student = nine(unet)
    lesson = Stage(density=tuple(uniform().tolist())).lesson(small.setting, held_out_of(small))
    teaching = Teaching(lambda teacher: teacher, lesson)
    batch = teaching.draw(min(HELD_OUT, small.setting.scenes), torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = (predicted(student, batch) - predicted(teaching.teacher, batch)).square().mean()
    assert held_out_error(small, student) == pytest.approx(float(wanted), rel=1e-4)
    learnt_from = Examples.load(examples_of(small)).moments
    held_out = Examples.load(held_out_of(small)).moments
    assert not any(torch.equal(a, b) for a in learnt_from for b in held_out)


def test_training_changes_a_student(small):
    before, after = (record_of(small, row, 0)["found"]["mse"] for row in small.rows[:2])
    assert before != after


def test_stage_two_draws_the_same_whatever_came_before():
    first, second = Stage(), Stage(objective="noise", fine_tuning=True)
    setting = SETTINGS["mini"]
    after, alone = second.plan(setting, 1, 1), second.plan(setting, 1, 0)
    assert after == alone and after.lr == setting.fine_tuning_lr
    seeds = [stage.plan(setting, seed).seed for stage in (first, second) for seed in range(3)]
    assert len(set(seeds)) == 6


def test_a_row_is_done_if_what_came_later_is_at_its_default(small):
    row = small.rows[3]
    assert "squared" not in record_of(small, row, 0)["settings"]["setting"]
    other = replace(small, setting=replace(small.setting, squared=False))
    assert state_of(other, row, 0) == "of other settings"
    changed = replace(row, changed=(("squared", False),))
    assert not changed.stages[0].lesson(changed.setting(small.setting), small.work).squared
    assert state_of(small, changed, 0) == "of other settings"


def test_longer_rows_are_more_work(small):
    untrained, first, _, both = (effort_of(small, row, 0) for row in small.rows)
    assert untrained == 2 * 6 * 2  # six images in two steps
    assert first - untrained == both - first == 4 * 2  # a step of two samples in each stage


def test_a_row_of_other_settings_is_not_done(small, nine):
    row = small.rows[3]
    for other in (
        replace(small, setting=replace(small.setting, lr=1e-3)),
        replace(small, rows=(replace(row, stages=row.stages[:1]),)),
        replace(small, rows=(replace(row, form=replace(nine, scales="minmax")),)),
    ):
        changed = next(r for r in other.rows if r.name == row.name)
        assert state_of(other, changed, 0) == "of other settings"
    assert state_of(small, row, 1) == "left"


def test_what_is_examined_is_what_is_packed(unet, nine):
    """An ordinary UNet of the stored numbers, and the packed one, compute the same."""
    student = quantize(unet, dict(nine.levels), [100, 500, 900])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter *= 1.001  # so that not all are numbers of float16
        packed = pack_student(student, [500])
        plain = as_stored(student, torch.tensor([500.0]))
        generator = torch.Generator().manual_seed(0)
        x, text = (
            torch.randn(1, 4, 16, 16, generator=generator),
            torch.randn(1, 24, 96, generator=generator),
        )
        outputs = [u(x, 500, encoder_hidden_states=text).sample for u in (packed, plain)]
    assert torch.equal(*outputs)


def test_the_study_has_the_rows_of_the_paper_with_three_seeds(unet):
    recipes = {name: Recipe({layer.name: 3 for layer in list_layers(unet)}) for name in RECIPES}
    rows = ablation_rows(recipes, uniform().tolist())
    assert [row.name for row in rows][:3] == ["QAT-Base", "+ balance", "+ alternating scales"]
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.seeds == (0, 1, 2) for row in rows if row.stages and row.group not in ONE_SEED)
    made = Ablation(SETTINGS["mini"], tuple(rows), ROOT, ROOT)
    assert len({made.file(row, seed) for row, seed in made.tasks()}) == len(made.tasks())
    order = [(seed, len(row.stages)) for row, seed in made.tasks()]
    assert order == sorted(order)


def test_the_result_has_two_students_and_what_they_are_measured_by():
    recipes, study = {name: Recipe({"a": 3}) for name in RECIPES}, Study.of("mini")
    rows, steps = {row.name: row for row in result_rows(recipes)}, {}
    for size in ("smallest", "1.99 paper bits"):
        assert rows[f"{size}, not trained"].seeds == (0,)
        taught = rows[f"{size}, Stage II"]
        assert taught.seeds == (0, 1, 2)
        plans = [stage.plan(taught.setting(SETTINGS["result"]), 0) for stage in taught.stages]
        steps[size] = [plan.steps for plan in plans]
        assert plans[1].lr == study.second_lr
    assert steps["1.99 paper bits"] == [study.first_steps, study.second_steps]
    assert steps["smallest"] == [4 * study.first_steps, study.second_steps]
    assert rows["smallest, Stage I"].stages == rows["smallest, Stage II"].stages[:1]
    rated = rows["smallest, with a rate term"]
    assert rated.stages[:1] == rows["smallest, Stage I"].stages and rated.stages[1].rate_weight > 0
    assert rated.stages[1].plan(rated.setting(SETTINGS["result"]), 0, 1).steps == study.first_steps
    assert SETTINGS["result"].asked[0] >= 512
    assert SETTINGS["result"].asked[1] != SETTINGS["mini"].asked[1]


def test_finished_rows_are_read(small):
    rows = finished(small)
    assert list(rows) == ["not trained", "Stage I", "palettes", "+ Stage II"]
    assert all(values.shape == (1, 6) for row in rows.values() for values in row.scores.values())
    table = row_table(rows)
    assert (
        len(table) == 12 and (table.low <= table.value).all() and (table.value <= table.high).all()
    )
