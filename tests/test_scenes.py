"""The world of mini: what may be sampled, how it is told and drawn."""

import itertools

import numpy as np
import pytest

from bf_lib.drawing import OUTLINES, draw
from bf_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_COLOURS,
    HELD_COUNTS,
    HELD_PAIRS,
    KINDS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    caption,
    describe,
    is_held_out,
    relation_of,
    sample_medley,
    sample_scene,
)


def many(count=150, **options):
    rng = np.random.default_rng(0)
    return [sample_scene(rng, **options) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_of_their_kind_and_objects_have_room(kind, held_out):
    for scene in many(40, kind=kind, held_out=held_out):
        assert scene.kind == kind
        assert is_held_out(scene) == held_out
        assert len(scene.things) == {"single": 1, "pair": 2, "relation": 2}.get(
            kind, len(scene.things)
        )
        assert 1 <= len(scene.things) <= 4
        for a, b in itertools.combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        for thing in scene.things:
            assert thing.radius < min(thing.x, thing.y, SIZE - thing.x, SIZE - thing.y)
        if kind in ("count", "pair") and len(scene.things) > 1:
            quarters = {(thing.x > SIZE / 2, thing.y > SIZE / 2) for thing in scene.things}
            assert len(quarters) == len(scene.things)
        if kind == "relation":
            a, b = scene.things
            assert relation_of((a.x, a.y), (b.x, b.y)) == scene.relation


def test_training_scenes_show_nothing_that_is_held_out():
    for scene in many(300):
        shapes = [thing.shape for thing in scene.things]
        assert not {(thing.colour, thing.shape) for thing in scene.things} & HELD_COLOURS
        assert frozenset(shapes) not in HELD_PAIRS
        if scene.kind == "count":
            assert (len(shapes), shapes[0]) not in HELD_COUNTS


def test_each_shape_misses_one_colour_and_one_partner():
    assert sorted(shape for _, shape in HELD_COLOURS) == sorted(SHAPES)
    assert sorted(itertools.chain(*HELD_PAIRS)) == sorted(SHAPES)


def test_complete_captions_name_everything():
    rng = np.random.default_rng(1)
    for scene in many(100):
        words = caption(scene, rng, complete=True).split()
        assert scene.background in words
        for thing in scene.things:
            assert thing.colour in words
            assert thing.shape in words or thing.shape + "s" in words or "crosses" in words


def test_captions_vary_and_are_repeatable():
    (scene,) = many(1, kind="relation")
    said = {caption(scene, np.random.default_rng(i)) for i in range(60)}
    assert len(said) > 20
    assert caption(scene, np.random.default_rng(3)) in said


def test_plain_descriptions():
    star, moon = Thing("star", "red", 20, 30, 9), Thing("moon", "orange", 45, 30, 9)
    assert describe(Scene((star,), "gray", "single")) == "a red star"
    assert describe(Scene((moon,), "gray", "single")) == "an orange moon"
    assert describe(Scene((star,) * 3, "gray", "count"), colour=False) == "three stars"
    pair = Scene((star, moon), "gray", "pair")
    assert describe(pair, colour=False) == "a star and a moon"
    related = Scene((star, moon), "gray", "relation", "left")
    assert describe(related) == "a red star to the left of an orange moon"


def test_relations_by_the_larger_displacement():
    assert relation_of((10, 30), (40, 35)) == "left"
    assert relation_of((40, 35), (10, 30)) == "right"
    assert relation_of((30, 10), (35, 40)) == "above"
    assert relation_of((35, 40), (30, 10)) == "below"
    assert relation_of((10, 10), (15, 10), least=12) is None
    assert relation_of((10, 10), (40, 35), least=12) is None  # neither axis is clear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_is_drawn_in_its_colour_where_it_is(shape, colour):
    thing = Thing(shape, colour, 30, 34, 12)
    image = draw(Scene((thing,), "gray", "single", texture=5))
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    grid = np.stack(np.meshgrid(np.arange(SIZE) + 0.5 - 30, np.arange(SIZE) + 0.5 - 34)) / 12
    inside = OUTLINES[shape](grid) < -0.15
    shown = np.median(image[inside].astype(float), axis=0)
    distance = {name: np.abs(shown - rgb).sum() for name, rgb in COLOURS.items()}
    assert min(distance, key=distance.get) == colour
    empty = draw(Scene((), "gray", "single", texture=5))
    outside = OUTLINES[shape](grid) > 0.9  # beyond the shadow
    assert np.array_equal(image[outside], empty[outside])


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_distances(shape):
    """Nowhere does a distance change faster than one moves, and the shape fits its radius."""
    line = np.linspace(-1.6, 1.6, 161)
    grid = np.stack(np.meshgrid(line, line))
    distance = OUTLINES[shape](grid)
    step = line[1] - line[0]
    for axis in (0, 1):
        assert np.abs(np.diff(distance, axis=axis)).max() <= step * (1 + 1e-6)
    assert (distance < 0).mean() > 0.05
    assert np.hypot(*grid)[distance < 0].max() < 1.16


def test_drawing_repeats():
    (scene,) = many(1)
    assert np.array_equal(draw(scene), draw(scene))


def test_medleys_hold_up_to_six_unrelated_objects():
    rng = np.random.default_rng(0)
    counts = {len(sample_medley(rng).things) for _ in range(60)}
    assert counts == set(range(7))


def test_backgrounds_are_told_apart():
    for name, colour in BACKGROUNDS.items():
        mean = draw(Scene((), name, "single", texture=1)).reshape(-1, 3).mean(axis=0)
        distance = {other: np.abs(mean - rgb).sum() for other, rgb in BACKGROUNDS.items()}
        assert min(distance, key=distance.get) == name, colour


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        sample_scene(np.random.default_rng(0), kind="crowd")
