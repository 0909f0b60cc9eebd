"""Trials of whole recipes: what they measure, and that weights are put back."""

from dataclasses import replace

import pytest
import torch
from test_sensitivity import SWEEP

from bf_lib.evaluation import challenges
from bf_lib.layers import list_layers
from bf_lib.models import load_pipeline
from bf_lib.sensitivity import Candidate
from bf_lib.trials import FULL, Trial, Trials, all_quantized, trial_table

ASKED = (1, 0)  # one challenge of each task
SIX = replace(SWEEP, prompts=tuple(c.prompt for c in challenges(*ASKED)), seeds=tuple(range(6)))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("mini")


@pytest.fixture(scope="module")
def names(pipe):
    return [layer.name for layer in list_layers(pipe.unet)]


def test_a_recipe_of_one_layer_is_its_candidate(pipe, names):
    trials = Trials(SWEEP, (("one", ((names[0], 3),)),))
    row = trials.bench(pipe).score(Trial("one"))
    candidate = SWEEP.bench(pipe).score(Candidate(names[0], 1))
    assert {m: row[m] for m in ("mse", "psnr", "clip")} == {
        m: candidate[m] for m in ("mse", "psnr", "clip")
    }
    assert "passed" not in row


def test_recipes_are_compared_and_judged(pipe, names):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    recipes = tuple((f"{n} levels", tuple((name, n) for name in names)) for n in (3, 17))
    trials = Trials(SIX, recipes, judged=ASKED)
    assert [task.name for task in trials.tasks(pipe.unet)] == [FULL, "3 levels", "17 levels"]
    bench = trials.bench(pipe)
    rows = [bench.score(task) for task in trials.tasks(pipe.unet)]
    table = trial_table(rows[::-1], [FULL, "3 levels", "17 levels"]).set_index("name")
    assert table.mse[FULL] == 0 and table.mse["3 levels"] > table.mse["17 levels"] > 0
    assert table.clip_drop[FULL] == 0
    assert table.scene.between(0, 1).all() and table.scene["3 levels"] <= table.scene[FULL]
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_weights_are_put_back_after_an_error(pipe, names):
    before = pipe.unet.state_dict()[f"{names[0]}.weight"].clone()
    with (
        pytest.raises(ValueError, match="odd"),
        all_quantized(pipe.unet, {names[0]: 3, names[1]: 4}),
    ):
        pass
    assert torch.equal(before, pipe.unet.state_dict()[f"{names[0]}.weight"])


def test_trials_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"names of their own: \['a'\]"):
        Trials(SWEEP, (("a", ()), ("a", ())))
    with pytest.raises(ValueError, match="challenges that are their prompts"):
        Trials(SWEEP, (), judged=ASKED)
