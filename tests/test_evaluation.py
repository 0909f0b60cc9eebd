"""The scene benchmark: its prompts, and what passes."""

from dataclasses import replace

import pytest

from bf_lib.evaluation import TASKS, challenges, interval, passes, score
from bf_lib.judges import Seen
from bf_lib.scenes import COLOURS, SHAPES, is_held_out

COUNT = 40


def perfect(challenge):
    """What a judge sees on a drawing of the challenge's scene."""
    return [
        Seen(thing.shape, thing.colour, thing.x, thing.y, 0.9) for thing in challenge.scene.things
    ]


def of_task(task, held_out=False):
    return [c for c in challenges(COUNT, seed=0, held_out=held_out) if c.task == task]


def another(value, values):
    """The next of some values, round about."""
    values = list(values)
    return values[(values.index(value) + 1) % len(values)]


@pytest.mark.parametrize("held_out", [False, True])
def test_each_task_is_asked_as_often_and_of_its_combinations(held_out):
    asked = challenges(COUNT, seed=3, held_out=held_out)
    assert [c.task for c in asked] == [task for task in TASKS for _ in range(COUNT)]
    assert all(is_held_out(c.scene) == held_out for c in asked)
    assert asked == challenges(COUNT, seed=3, held_out=held_out)
    assert asked != challenges(COUNT, seed=4, held_out=held_out)


def test_prompts_say_what_is_judged_and_no_more():
    for challenge in challenges(COUNT, seed=0):
        words = challenge.prompt.split()
        assert all(any(t.shape in word for word in words) for t in challenge.scene.things)
        named = [word for word in words if word in COLOURS]
        coloured = challenge.task in ("colours", "colour attribution")
        assert len(named) == (len(challenge.scene.things) if coloured else 0)
    for challenge in challenges(COUNT, seed=0, held_out=True):
        assert set(challenge.prompt.split()) & set(COLOURS)


def test_some_tasks_have_few_prompts_as_the_model_card_says():
    prompts = {task: set() for task in TASKS}
    for challenge in challenges(600, seed=0):
        prompts[challenge.task].add(challenge.prompt)
    few = {task: len(prompts[task]) for task in ("single object", "counting", "two objects")}
    assert few == {"single object": 8, "counting": 20, "two objects": 48}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_drawing_of_the_scene_passes_and_an_empty_image_fails(held_out):
    asked = challenges(COUNT, seed=0, held_out=held_out)
    assert score(asked, [perfect(c) for c in asked]).to_dict() == dict.fromkeys(TASKS, 1.0)
    assert score(asked, [[] for _ in asked]).to_dict() == dict.fromkeys(TASKS, 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_shape_fails_every_task(task):
    for challenge in of_task(task):
        first, *rest = perfect(challenge)
        others = set(SHAPES) - {s.shape for s in [first, *rest]}
        wrong = [replace(first, shape=sorted(others)[0]), *rest]
        assert not passes(challenge, wrong)


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_colour_fails_only_where_colours_are_judged(task):
    for challenge in of_task(task):
        first, *rest = perfect(challenge)
        wrong = [replace(first, colour=another(first.colour, COLOURS)), *rest]
        assert passes(challenge, wrong) == (task not in ("colours", "colour attribution"))
    for challenge in of_task(task, held_out=True):  # where every prompt names them
        first, *rest = perfect(challenge)
        wrong = [replace(first, colour=another(first.colour, COLOURS)), *rest]
        assert not passes(challenge, wrong)


def test_the_interval_of_a_share_is_wilsons():
    low, high = interval(0.9, 100)
    z = 1.959964
    middle, half = (0.9 + z**2 / 200) / (1 + z**2 / 100), z / (1 + z**2 / 100)
    half *= (0.9 * 0.1 / 100 + z**2 / 40_000) ** 0.5
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert interval(1.0, 50)[1] == 1.0


def test_swapped_colours_fail_attribution():
    for challenge in of_task("colour attribution"):
        a, b = perfect(challenge)
        assert not passes(challenge, [replace(a, colour=b.colour), replace(b, colour=a.colour)])


def test_one_object_more_or_less_fails_counting_and_one_more_fails_nothing_else():
    for challenge in challenges(COUNT, seed=0):
        seen = perfect(challenge)
        more = [*seen, replace(seen[0], x=1.0, y=1.0, heat=0.6)]  # less confident
        assert passes(challenge, more) == (challenge.task != "counting")
        assert not passes(challenge, seen[1:])


def test_swapped_places_fail_position():
    for challenge in of_task("position"):
        a, b = perfect(challenge)
        assert not passes(challenge, [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)])


def test_counting_asks_for_two_to_four():
    assert {len(c.scene.things) for c in of_task("counting")} == {2, 3, 4}
