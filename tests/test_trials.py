"""Trials of whole recipes: what they measure, and that weights are put back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sensitivity import SWEEP

from bf_lib.evaluation import challenges
from bf_lib.layers import get_layer, list_layers
from bf_lib.models import load_pipeline
from bf_lib.protocol import study_prompts, study_sweep, study_trials
from bf_lib.recipe import Recipe
from bf_lib.sensitivity import Candidate
from bf_lib.study import Study
from bf_lib.trials import (
    FULL,
    Trial,
    Trials,
    all_quantized,
    difference,
    score_intervals,
    trial_table,
)

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


def test_scales_are_found_once(pipe, names):
    scales = {}
    with all_quantized(pipe.unet, {names[0]: 3, names[1]: 5}, scales):
        first = get_layer(pipe.unet, names[0]).weight.detach().clone()
    assert set(scales) == {(names[0], 3), (names[1], 5)}
    with all_quantized(pipe.unet, {names[0]: 3}, scales):
        assert torch.equal(first, get_layer(pipe.unet, names[0]).weight)
    scales[names[0], 3] = 2 * scales[names[0], 3]  # it is this that is used
    with all_quantized(pipe.unet, {names[0]: 3}, scales):
        assert not torch.equal(first, get_layer(pipe.unet, names[0]).weight)


def test_scores_have_intervals_over_prompts():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 200)
    rows = [
        {"name": "low", "mse": (5 + noise).tolist(), "passed": [True] * 150 + [False] * 50},
        {"name": "high", "mse": (5.1 + noise).tolist(), "passed": [True] * 200},
    ]
    found = score_intervals(rows, ["high", "low"], ["mse", "passed"]).set_index(["name", "score"])
    assert list(found.columns) == ["value", "low", "high"]
    low = found.loc["low", "mse"]
    assert low.value == pytest.approx(5 + noise.mean())
    # 1.96 standard errors at each side
    assert low.high - low.low == pytest.approx(2 * 1.96 * noise.std() / 200**0.5, rel=0.05)
    assert found.loc["low", "passed"].value == 0.75
    assert found.loc["high", "passed"].tolist() == [1, 1, 1]
    # The noise is the same in both, so their difference has none.
    paired = difference(rows, "high", "low", "mse")
    assert paired == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})


def test_the_study_tries_recipes_by_other_prompts():
    recipes = {"a": Recipe({"x": 3, "y": 5})}
    study = Study.of("smoke")
    sweep = study_sweep(study, study_prompts(study, 0), [])
    trials = study_trials(study, recipes, 0)
    assert trials.recipes == (("a", (("x", 3), ("y", 5))),)
    assert not set(trials.sweep.prompts) & set(sweep.prompts)
    assert trials.judged == (study.challenges, 100)
    large = Study.of("sd15", model="anything", prompts=3)
    trials = study_trials(large, recipes, 0)
    assert trials.judged is None and trials.sweep.prompts == tuple(study_prompts(large, 0))
    assert set(trials.sweep.seeds).isdisjoint(study_sweep(large, trials.sweep.prompts, []).seeds)


def test_trials_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"names of their own: \['a'\]"):
        Trials(SWEEP, (("a", ()), ("a", ())))
    with pytest.raises(ValueError, match="challenges that are their prompts"):
        Trials(SWEEP, (), judged=ASKED)
