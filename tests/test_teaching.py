"""What students are taught: objectives by hand, captions dropped for both, and learning."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lessons import same, seeded, ternary, toy_lesson
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessRaisedException

from bf_lib.distillation import BlockFeatures, feature_loss
from bf_lib.noising import predicted
from bf_lib.teaching import Lesson, Teaching, example_losses
from bf_lib.times import beta
from bf_lib.training import Plan, fit
from bf_lib.training_state import load_ema


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    return toy_lesson(tmp_path_factory.mktemp("model"))


def test_stage_one_is_the_error_of_noise_and_features(lesson):
    task = Teaching(ternary, replace(lesson, feature_weight=0.1))
    found = task.loss(0, 4, seeded())
    batch = task.draw(4, seeded())
    with BlockFeatures(task.model) as learnt, BlockFeatures(task.teacher) as known:
        noise = (predicted(task.model, batch) - predicted(task.teacher, batch)).square().mean()
        features = feature_loss(learnt.taken, known.taken)
    torch.testing.assert_close(found["noise"], noise)
    torch.testing.assert_close(found["features"], features)
    torch.testing.assert_close(found["loss"], noise + 0.1 * features)
    found["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_errors_need_not_be_squared(lesson):
    plain = Teaching(ternary, lesson).loss(0, 1, seeded())
    rooted = Teaching(ternary, replace(lesson, squared=False)).loss(0, 1, seeded())
    torch.testing.assert_close(rooted["noise"].square(), plain["noise"])  # of one sample
    assert rooted["features"] != plain["features"]
    rooted["loss"].backward()
    same_as_teacher = Teaching(same, replace(lesson, squared=False)).loss(0, 1, seeded())
    assert 0 <= float(same_as_teacher["loss"]) < 1e-5


def test_a_lesson_knows_what_it_is(lesson):
    """Also where its losses before any training are the same."""
    base = Teaching(ternary, replace(lesson, feature_weight=0.0)).identity
    others = [
        Teaching(ternary, replace(lesson, feature_weight=0.0, dropped=0.11)),
        Teaching(ternary, replace(lesson, feature_weight=0.0, relative=True)),
        Teaching(same, replace(lesson, feature_weight=0.0)),
    ]
    assert Teaching(ternary, replace(lesson, feature_weight=0.0)).identity == base
    assert all(other.identity != base for other in others)


def test_lessons_that_cannot_be_are_refused(lesson):
    for wrong, said in (
        ({"objective": "nois"}, "objective='nois'"),
        ({"feature_weight": -1.0, "rate_weight": -1.0}, "feature_weight=-1.0, rate_weight=-1.0"),
        ({"dropped": 2.0, "guidance": 0.5}, "dropped=2.0, guidance=0.5"),
        ({"density": (0.25, 0.25)}, "a density whose sum is 0.5"),
    ):
        with pytest.raises(ValueError, match=f"impossible lesson: {said}$"):
            replace(lesson, **wrong)


def test_models_that_do_not_predict_noise_are_refused(tmp_path):
    lesson = toy_lesson(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for changed, said in (
        ({"prediction_type": "v_prediction"}, "predicts 'v_prediction'"),
        ({"num_train_timesteps": 500}, "has 500 time-steps, the density 1000"),
    ):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=said):
            Teaching(ternary, lesson)


def test_a_start_that_is_missing_is_said(lesson, tmp_path):
    with pytest.raises(FileNotFoundError, match="no training is in"):
        Teaching(ternary, lesson, tmp_path)


def test_without_features_only_the_noise_counts(lesson):
    found = Teaching(ternary, replace(lesson, feature_weight=0.0)).loss(0, 4, seeded())
    assert found.keys() == {"loss", "noise"} and torch.equal(found["loss"], found["noise"])


def test_the_teacher_itself_has_nothing_to_learn(lesson):
    for objective in ("distillation", "guided"):
        assert (
            float(
                Teaching(same, replace(lesson, objective=objective)).loss(0, 4, seeded())["loss"]
            )
            == 0
        )


def test_stage_two_is_the_error_of_the_noise_that_was_added(lesson):
    task = Teaching(ternary, replace(lesson, objective="noise"))
    batch = task.draw(4, seeded())
    wanted = (predicted(task.model, batch) - batch.noise).square().mean()
    torch.testing.assert_close(task.loss(0, 4, seeded())["loss"], wanted)


def test_losses_of_examples_are_those_of_stage_two_one_by_one(lesson):
    task = Teaching(ternary, replace(lesson, objective="noise"))
    found = example_losses(task, task.model, 4)
    assert len(found) == 4 and len(set(found)) == 4
    whole = task.loss(0, 4, torch.Generator().manual_seed(0))["loss"]
    assert sum(found) / 4 == pytest.approx(float(whole.detach()), rel=1e-5)
    assert found == example_losses(task, task.model, 4) != example_losses(task, task.teacher, 4)
    assert len(example_losses(task, task.teacher, 5, batch=2)) == 5


def test_guided_noise_is_that_of_sampling(lesson):
    task = Teaching(ternary, replace(lesson, objective="guided", guidance=3.0, dropped=0.0))
    batch = task.draw(2, seeded())
    empty = replace(batch, text=task.encode([""]).expand_as(batch.text))
    guided = [
        predicted(unet, empty) + 3.0 * (predicted(unet, batch) - predicted(unet, empty))
        for unet in (task.model, task.teacher)
    ]
    wanted = (guided[0] - guided[1]).square().mean()
    torch.testing.assert_close(task.loss(0, 2, seeded())["loss"], wanted, rtol=1e-4, atol=1e-6)


def test_noised_latents_are_those_of_the_schedule(lesson):
    task = Teaching(same, replace(lesson, density=tuple(beta(3.0).tolist())))
    batch = task.draw(500, seeded())
    assert (batch.t.double().mean() / 1000).item() == pytest.approx(0.75, abs=0.01)
    a = task.alphas[batch.t].view(-1, 1, 1, 1)
    clean = (batch.x - (1 - a).sqrt() * batch.noise) / a.sqrt()
    latents, _ = task.examples.draw(500, seeded())
    early = batch.t < 700  # later, the division makes much of rounding
    torch.testing.assert_close(clean[early], latents[early], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropped", [0.0, 0.1, 1.0])
def test_so_many_captions_are_dropped(lesson, dropped):
    task = Teaching(same, replace(lesson, dropped=dropped))
    batch = task.draw(1000, seeded())
    empty = (batch.text == task.encode([""])).flatten(1).all(dim=1)
    assert empty.float().mean().item() == pytest.approx(dropped, abs=0.02)


def test_a_student_learns_and_goes_on_from_where_it_was(lesson, tmp_path):
    plan = Plan(steps=40, batch=8, lr=2e-3, warmup=5, weight_decay=0.0, ema=0.9, save_every=20)
    fit(partial(Teaching, ternary, lesson), plan, tmp_path / "one")
    before = Teaching(ternary, lesson)
    after = Teaching(ternary, lesson, start=tmp_path / "one")
    with torch.no_grad():
        first, second = (float(task.loss(0, 64, seeded())["loss"]) for task in (before, after))
    assert second < 0.8 * first
    again = load_ema(ternary(before.teacher), tmp_path / "one")
    for a, b in zip(again.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stage_two_goes_on_from_stage_one(lesson, tmp_path):
    """At next to no rate it ends with what it began with, and not with the untrained student."""
    plan = Plan(steps=20, batch=8, lr=2e-3, warmup=5, weight_decay=0.0, ema=0.9, save_every=20)
    fit(partial(Teaching, ternary, lesson), plan, tmp_path / "one", processes=1)
    second = partial(Teaching, ternary, replace(lesson, objective="noise"), tmp_path / "one")
    fit(second, replace(plan, lr=1e-12), tmp_path / "two", processes=1)
    untrained = ternary(Teaching(same, lesson).teacher)
    one, two = (load_ema(copy.deepcopy(untrained), tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    assert any(
        not torch.allclose(a, b, rtol=0, atol=1e-6)
        for a, b in zip(one.parameters(), untrained.parameters(), strict=True)
    )


def test_stage_two_of_another_stage_one_is_another(lesson, tmp_path):
    plan = Plan(steps=1, batch=8, lr=2e-3, warmup=1, weight_decay=0.0, save_every=20)
    for seed, name in enumerate(("one", "other")):
        make = partial(Teaching, ternary, lesson)
        fit(make, replace(plan, seed=seed), tmp_path / name, processes=1)
    noise = replace(lesson, objective="noise")
    one, again, other = (
        Teaching(ternary, noise, tmp_path / name).identity for name in ("one", "one", "other")
    )
    assert one == again != other
    assert "start" not in Teaching(ternary, noise).identity


class Dying(Teaching):
    """Dies at step 30, once."""

    def __init__(self, lesson: Lesson, marked: Path) -> None:
        super().__init__(ternary, lesson)
        self.marked = marked

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == 30 and not self.marked.exists():
            self.marked.touch()
            raise RuntimeError("killed")
        return super().loss(step, size, generator)


def test_a_student_is_the_same_after_a_kill(lesson, tmp_path):
    plan = Plan(steps=40, batch=4, lr=2e-3, warmup=5, weight_decay=0.0, save_every=20)
    fit(partial(Teaching, ternary, lesson), plan, tmp_path / "whole", processes=1)
    killed = partial(Dying, lesson, tmp_path / "marked")
    with pytest.raises(ProcessRaisedException, match="killed"):
        fit(killed, plan, tmp_path / "killed", processes=1)
    fit(killed, plan, tmp_path / "killed", processes=1)
    whole, resumed = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("squared", [True, False])
def test_in_bfloat16_the_loss_is_of_single_precision(lesson, squared, tmp_path):
    """And weights, averages and moments are: only the forward pass is not."""
    lesson = replace(lesson, squared=squared)
    task = Teaching(ternary, lesson)
    with torch.autocast("cpu", torch.bfloat16):
        rough = task.loss(0, 4, seeded())
    fine = task.loss(0, 4, seeded())
    for name, value in rough.items():
        assert value.dtype == torch.float32, name
        assert float(value.detach()) == pytest.approx(float(fine[name].detach()), rel=0.1)
        assert not torch.equal(value, fine[name])
    plan = Plan(steps=1, batch=4, lr=2e-3, warmup=1, weight_decay=0.0, precision="bf16")
    fit(partial(Teaching, ternary, lesson), plan, tmp_path, processes=1)
    kept = load_file(tmp_path / "checkpoint.safetensors").values()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in kept)
