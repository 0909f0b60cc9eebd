"""What students of a study learn from, and how long."""

import pytest

from bf_lib import protocol
from bf_lib.study import Study
from bf_lib.training_data import HELD_OUT, SCENES


@pytest.fixture
def asked(monkeypatch):
    """The scenes that are asked for, instead of drawn."""
    found = []

    def scenes(model, count, folder, first=0, processes=2):
        found.append(range(first, first + count))

    monkeypatch.setattr(protocol, "scene_examples", scenes)
    return found


@pytest.mark.parametrize("preset", ["smoke", "mini"])
def test_scenes_that_are_held_out_are_none_that_is_trained_on(asked, preset, tmp_path):
    study = Study.of(preset)
    for held_out in (False, True):
        protocol.study_examples(study, None, tmp_path, held_out=held_out)
    learnt_from, unseen = asked
    assert len(learnt_from) == study.examples <= SCENES <= unseen[0]
    assert len(unseen) == min(HELD_OUT, study.examples)


def test_other_models_learn_from_images(asked, tmp_path):
    with pytest.raises(ValueError, match="sd15 learns from images: give a folder"):
        protocol.study_examples(Study.of("sd15"), None, tmp_path)
    assert asked == []


def test_examples_that_cannot_be_are_refused(asked, tmp_path):
    study = Study.of("mini")
    with pytest.raises(ValueError, match="give a folder of these alone"):
        protocol.study_examples(study, None, tmp_path, images=tmp_path, held_out=True)
    with pytest.raises(ValueError, match=f"{SCENES} scenes to learn from, not {SCENES + 1}"):
        protocol.study_examples(Study.of("mini", examples=SCENES + 1), None, tmp_path)
    assert asked == []


def test_stages_have_the_papers_steps_and_rate():
    first, second = (protocol.study_plan(Study.of("sd15"), 3, stage) for stage in (1, 2))
    assert (first.steps, second.steps) == (20_000, 50_000)
    assert {plan.rate(step) for plan in (first, second) for step in (1000, 19_999)} == {1e-5}
    assert first.seed != second.seed
    assert first.save_every == 1000  # of 13 GB each
    assert first.shares(1) == (64, 4)
