"""Errors over time: none of the teacher itself, by hand elsewhere, the same examples each time."""

from dataclasses import replace

import pytest
import torch
from lessons import TIMES, same, seeded, ternary, toy_lesson

from bf_lib.noising import predicted
from bf_lib.teaching import Teaching
from bf_lib.time_errors import errors_over_time


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    return toy_lesson(tmp_path_factory.mktemp("model"))


def test_the_teacher_has_no_error(lesson):
    rows = errors_over_time(Teaching(same, lesson), TIMES[:3], count=4)
    assert (
        rows.t.tolist() == TIMES[:3] and (rows[["noise_mse", "latent_mse"]] == 0).to_numpy().all()
    )


def test_errors_are_those_of_equation_nine(lesson):
    teaching = Teaching(ternary, replace(lesson, dropped=0.0))
    rows = errors_over_time(teaching, TIMES, count=6, batch=4, seed=3).set_index("t")
    assert (rows > 0).to_numpy().all()
    generator = torch.Generator().manual_seed(3)
    errors = []
    for size in (4, 2):
        batch = teaching.draw(size, generator, torch.full((size,), TIMES[7]))
        with torch.no_grad():
            error = predicted(teaching.model, batch) - predicted(teaching.teacher, batch)
        errors.append(error.square())
    noise = torch.cat(errors).mean().item()
    a = teaching.alphas[TIMES[7]].item()
    assert rows.noise_mse[TIMES[7]] == pytest.approx(noise, rel=1e-5)
    assert rows.latent_mse[TIMES[7]] == pytest.approx(noise * (1 - a) / a, rel=1e-5)
    again = errors_over_time(teaching, [TIMES[7]], count=6, batch=4, seed=3)
    assert again.noise_mse[0] == rows.noise_mse[TIMES[7]]


def test_time_steps_can_be_given(lesson):
    teaching = Teaching(same, lesson)
    one, two = (teaching.draw(5, seeded(), torch.full((5,), t)) for t in (50, 950))
    assert torch.equal(one.noise, two.noise) and torch.equal(one.text, two.text)
    assert one.t.tolist() == [50] * 5 and not torch.equal(one.x, two.x)
