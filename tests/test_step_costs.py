"""Costs of steps: what is timed, and that nothing is left behind."""

import pytest
import torch
from lessons import ternary, toy_lesson

from bf_lib.step_costs import step_costs
from bf_lib.teaching import Teaching


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    return Teaching(ternary, toy_lesson(tmp_path_factory.mktemp("model")))


def test_steps_are_timed_in_turns(teaching):
    before = {name: value.clone() for name, value in teaching.model.state_dict().items()}
    table = step_costs(teaching, size=2, repeats=2).set_index("what").value
    parts = table["teacher, forward"] + table["plain fine-tuning"]
    assert table["Stage I / sum of the others"] == pytest.approx(table["Stage I"] / parts)
    assert 0 < table["teacher, forward"] < table["plain fine-tuning"] < table["Stage I"]
    assert all(p.grad is None for p in teaching.model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in teaching.model.state_dict().items())
