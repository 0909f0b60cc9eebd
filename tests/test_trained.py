"""Candidates that are trained before they are scored."""

from dataclasses import fields, replace
from statistics import mean

import pytest
import torch
from test_sensitivity import SWEEP

from bf_lib.layers import get_layer, list_layers
from bf_lib.models import load_pipeline
from bf_lib.protocol import spread, study_prompts, study_sweep, training_captions, with_training
from bf_lib.sensitivity import FULL_PRECISION, Candidate, TrainedSweep, Training, table
from bf_lib.sensitivity.sweep import Bench
from bf_lib.study import Study

CAPTIONS = ("a green heart", "a yellow ring", "three stars")
LAYER = "up_blocks.2.resnets.1.conv1"


def trained_sweep(**changes):
    settings = {field.name: getattr(SWEEP, field.name) for field in fields(SWEEP)}
    training = Training(CAPTIONS, steps=8, batch=4, lr=1e-3, held_out=16)
    return TrainedSweep(**settings, training=replace(training, **changes))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("mini")


@pytest.fixture(scope="module")
def bench(pipe):
    return trained_sweep().bench(pipe)


def test_training_takes_error_away_and_everything_is_put_back(bench, pipe):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    row = bench.score(Candidate(LAYER, 1))
    assert row["noise_mse_after"] < 0.8 * row["noise_mse_before"]
    untrained = Bench.score(bench, Candidate(LAYER, 1))
    assert set(row) == set(untrained) | {"noise_mse_before", "noise_mse_after"}
    assert row["mse"] != untrained["mse"]
    assert row["weight_mse"] > 0
    after = pipe.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert bench.score(Candidate(LAYER, 1)) == row, "the same lessons in the same order"


def test_full_precision_is_not_trained(bench):
    row = bench.score(FULL_PRECISION)
    assert row["mse"] == [0, 0] and row["noise_mse_before"] == row["noise_mse_after"] == 0


@pytest.mark.parametrize(("scope", "moves"), [("layer", False), ("unet", True)])
def test_only_the_layer_is_trained_unless_all_is_asked_for(pipe, monkeypatch, scope, moves):
    bench = trained_sweep(scope=scope).bench(pipe)
    other = get_layer(pipe.unet, "up_blocks.2.resnets.0.conv1").weight
    fit, moved = bench._fit, []

    def watched(layer):
        kept = other.detach().clone()
        fit(layer)
        moved.append(not torch.equal(other, kept))

    monkeypatch.setattr(bench, "_fit", watched)
    bench.score(Candidate(LAYER, 2))
    assert moved == [moves]


def test_lessons_are_what_full_precision_predicts(bench, pipe):
    lessons = bench.lessons
    assert len(lessons.x) == 8 * 4 + 16
    with torch.no_grad():
        noise = pipe.unet(
            lessons.x[:2], lessons.t[:2], encoder_hidden_states=lessons.text[:2]
        ).sample
    torch.testing.assert_close(noise, lessons.noise[:2], rtol=1e-4, atol=1e-4)
    empty = (lessons.text == bench.embeds.empty).flatten(1).all(dim=1).float().mean()
    assert 0 < float(empty) < 0.3


def test_half_precision_is_not_trained():
    with pytest.raises(ValueError, match="trained in float32, not in float16"):
        replace(trained_sweep(), dtype="float16")


def test_prompts_of_the_sweep_are_not_trained_on():
    with pytest.raises(ValueError, match=r"must not be trained on: \['a red star'\]"):
        trained_sweep(captions=("a red star", *CAPTIONS))
    with pytest.raises(ValueError, match="scope must be one of"):
        trained_sweep(scope="block")
    with pytest.raises(ValueError, match="impossible training"):
        trained_sweep(steps=0)


def test_a_study_trains_on_other_captions(pipe):
    study = Study.of("smoke")
    layers = list_layers(pipe.unet)
    prompts = study_prompts(study, 0)
    sweep = with_training(study, study_sweep(study, prompts, layers), spread(layers, 2), 0)
    assert len(sweep.layers) == 2
    assert sweep.prompts == tuple(prompts)
    assert not set(sweep.training.captions) & set(prompts)
    assert training_captions(5, 0, []) == training_captions(5, 0, [])
    assert training_captions(5, 0, []) != training_captions(5, 1, [])


def test_the_table_shows_what_was_learnt(bench, pipe):
    rows = [bench.score(task) for task in (FULL_PRECISION, Candidate(LAYER, 1))]
    frame = table(rows, list_layers(pipe.unet))
    assert frame.noise_mse_after[0] == rows[1]["noise_mse_after"]
    assert frame.mse[0] == pytest.approx(mean(rows[1]["mse"]))
