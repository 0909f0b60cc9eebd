"""Costs of steps: what is timed and kept, and that nothing is left behind."""

import pytest
import torch
from lessons import ternary, toy_lesson

from bf_lib.layers import list_layers
from bf_lib.step_costs import step_costs
from bf_lib.teaching import Teaching


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    return Teaching(ternary, toy_lesson(tmp_path_factory.mktemp("model")))


def test_steps_are_timed_in_turns(teaching):
    before = {name: value.clone() for name, value in teaching.model.state_dict().items()}
    seconds = step_costs(teaching, size=2, repeats=2).set_index("what").seconds
    assert 0 < seconds["teacher, forward"] < seconds["plain fine-tuning"] < seconds["Stage I"]
    assert all(p.grad is None for p in teaching.model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in teaching.model.state_dict().items())


def test_what_is_there_between_steps_is_counted_by_parameters(teaching):
    found = step_costs(teaching, size=2, repeats=1).set_index("what").state_mb
    teacher = sum(p.numel() for p in teaching.teacher.parameters())
    student = sum(p.numel() for p in teaching.model.parameters())
    assert found.tolist() == pytest.approx([4e-6 * teacher, 20e-6 * teacher, 20e-6 * student])


def test_less_is_kept_in_half_precision(teaching):
    kept = [
        step_costs(teaching, size=4, repeats=1, precision=precision).set_index("what").kept_mb
        for precision in ("no", "bf16")
    ]
    ratio = kept[1]["plain fine-tuning"] / kept[0]["plain fine-tuning"]
    assert 0.4 < ratio < 0.95  # norms keep float32, and weights are there in both


def test_what_is_kept_grows_with_the_batch_and_by_rounded_weights(teaching):
    two, four = (
        step_costs(teaching, size=size, repeats=1).set_index("what").kept_mb for size in (2, 4)
    )
    assert two["teacher, forward"] == 0
    # twice as many activations; of Stage I, rounded weights as well, which do not grow
    assert four["plain fine-tuning"] == pytest.approx(2 * two["plain fine-tuning"], rel=0.05)
    weights = 4e-6 * sum(layer.params for layer in list_layers(teaching.teacher))
    for kept in (two, four):
        assert 0.9 * weights < kept["Stage I"] - kept["plain fine-tuning"] < 2.5 * weights
