"""The world of `mini`: scenes of a few objects, their captions, and what is held out.

A scene holds one to four objects, each with a shape, a colour, a size and a place, before a
coloured background; `bf_lib.drawing` draws it. The scene itself is the ground truth: a judge can
be trained on it and a generated image checked against it.

Three kinds of combination never occur in training, so that compositional generalisation can be
measured: some colours of some shapes, some counts of some shapes, and some pairs of shapes.
"""

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "NUMBERS",
    "OPPOSITE",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "Scene",
    "Thing",
    "caption",
    "describe",
    "is_held_out",
    "relation_of",
    "sample_medley",
    "sample_scene",
]

import math
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels along each side
GAP = 3.0  # least number of pixels between the outlines of two objects
MARGIN = 1.5  # least number of pixels between an outline and the border

# sRGB; far enough apart that shading and jitter never turn one into another
COLOURS = {
    "red": (216, 40, 44),
    "orange": (244, 136, 24),
    "yellow": (250, 222, 56),
    "green": (52, 168, 72),
    "blue": (44, 92, 224),
    "purple": (134, 54, 184),
    "pink": (250, 140, 196),
    "white": (246, 246, 244),
}
BACKGROUNDS = {
    "black": (30, 30, 36),
    "gray": (128, 130, 134),
    "sand": (196, 172, 132),
    "teal": (18, 92, 98),
}
# name of a relation -> unit vector from the second object to the first, y pointing down
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
SIZES = {"small": (7.0, 8.0), "": (9.0, 11.0), "large": (13.0, 15.0)}  # radius in pixels
NUMBERS = ("zero", "one", "two", "three", "four")


SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

# Each shape misses one colour in training; some miss one count or one partner.
HELD_COLOURS = frozenset(
    (tuple(COLOURS)[(3 * i + 1) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES)
)
HELD_COUNTS = frozenset({(2, "ring"), (3, "heart"), (3, "cross"), (4, "star")})
HELD_PAIRS = frozenset(
    map(
        frozenset,
        [("circle", "heart"), ("square", "moon"), ("triangle", "ring"), ("star", "cross")],
    )
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, and where (centre, radius in pixels; tilt in radians)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    tilt: float = 0.0
    size: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene: its objects, background and kind, and the seed of its texture and tints."""

    things: tuple[Thing, ...]
    background: str
    kind: str  # one of "single", "count", "pair", "relation", "medley"
    relation: str | None = None
    texture: int = 0


def is_held_out(scene: Scene) -> bool:
    """Tells whether a scene shows a combination that is kept out of training."""
    shapes = {thing.shape for thing in scene.things}
    return (
        any((thing.colour, thing.shape) in HELD_COLOURS for thing in scene.things)
        or (scene.kind == "count" and (len(scene.things), *shapes) in HELD_COUNTS)
        or frozenset(shapes) in HELD_PAIRS
    )


# How often each kind of scene is drawn.
KINDS = {"single": 0.12, "count": 0.28, "pair": 0.28, "relation": 0.32}


def sample_scene(
    rng: np.random.Generator, kind: str | None = None, held_out: bool = False
) -> Scene:
    """Draws a scene at random, from the training combinations or from those held out.

    Arguments:
        rng: The source of randomness.
        kind: The kind of scene; at random by `KINDS` if None.
        held_out: Whether the scene must show a held-out combination, instead of must not.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    while True:
        chosen = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
        scene = _propose(rng, chosen)
        if is_held_out(scene) == held_out:
            return scene


def sample_medley(rng: np.random.Generator) -> Scene:
    """Draws up to six unrelated objects: a judge must read what no caption says, too."""
    radii = [float(rng.uniform(6.5, 9.5)) for _ in range(rng.integers(0, 7))]
    things = tuple(
        Thing(
            str(rng.choice(SHAPES)),
            str(rng.choice(list(COLOURS))),
            *place,
            radius,
            rng.uniform(-1, 1),
        )
        for place, radius in zip(_place(rng, radii, None), radii, strict=True)
    )
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(things, background, "medley", texture=int(rng.integers(2**31)))


def _propose(rng: np.random.Generator, kind: str) -> Scene:
    """Proposes a scene of one kind from all combinations."""
    relation = str(rng.choice(list(RELATIONS))) if kind == "relation" else None
    background = str(rng.choice(list(BACKGROUNDS)))
    if kind == "single":
        size = str(rng.choice(list(SIZES), p=[0.25, 0.5, 0.25]))
        looks = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), size)]
    elif kind == "count":
        looks = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), "")] * int(
            rng.integers(1, 5)
        )
    else:
        shapes = rng.choice(SHAPES, 2, replace=False)
        colours = rng.choice(list(COLOURS), 2, replace=False)
        looks = [(str(s), str(c), "") for s, c in zip(shapes, colours, strict=True)]
    radii = [rng.uniform(*SIZES[size]) for *_, size in looks]
    free = len(looks) == 1 or relation is not None
    places = _place(rng, radii, relation) if free else _place_in_quarters(rng, radii)
    things = tuple(
        Thing(shape, colour, *place, radius, rng.uniform(-0.25, 0.25), size)
        for (shape, colour, size), place, radius in zip(looks, places, radii, strict=True)
    )
    return Scene(things, background, kind, relation, int(rng.integers(2**31)))


def _place(
    rng: np.random.Generator, radii: list[float], relation: str | None
) -> list[tuple[float, float]]:
    """Finds centres with room between the objects, the first in `relation` to the second."""
    while radii:
        at: list[tuple[float, float]] = []
        for _ in range(12 * len(radii)):
            radius = radii[len(at)]
            x, y = map(float, rng.uniform(radius + MARGIN, SIZE - radius - MARGIN, 2))
            if all(
                math.dist((x, y), a) >= radius + r + GAP for a, r in zip(at, radii, strict=False)
            ):
                at.append((x, y))
            if len(at) == len(radii):
                if relation is None or relation_of(at[0], at[1], least=12.0) == relation:
                    return at
                break
    return []


def _place_in_quarters(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Finds centres in a quarter of the image each, so that a glance tells how many there are."""
    places = []
    for quarter, radius in zip(rng.permutation(4), radii, strict=False):
        x, y = map(float, rng.uniform(radius + MARGIN, (SIZE - GAP) / 2 - radius, 2))
        places.append((SIZE - x if quarter % 2 else x, SIZE - y if quarter // 2 else y))
    return places


def relation_of(a: tuple[float, float], b: tuple[float, float], least: float = 0.0) -> str | None:
    """Names where `a` lies as seen from `b`: the axis of the larger displacement decides.

    Arguments:
        a: The centre (x, y) of the first object; y points down.
        b: The centre of the second object.
        least: The displacement in pixels along that axis below which no relation holds. When it
            is positive, the other axis must also be clearly smaller (at most 0.6 of it).
    """
    dx, dy = a[0] - b[0], a[1] - b[1]
    major, minor = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if major < least or (least and minor > 0.6 * major):
        return None
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


# Captions

_FRAMES = ("{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}")
_BEHIND = (
    "{} on a {} background",
    "{} in front of a {} background",
    "{} on {}",
    "{} over a {} backdrop",
)
_AND = ("{} and {}", "{} next to {}", "{} with {}", "{} together with {}", "{} beside {}")
_RELATED = {
    "left": ("{} to the left of {}", "{} left of {}", "{} on the left of {}"),
    "right": ("{} to the right of {}", "{} right of {}", "{} on the right of {}"),
    "above": ("{} above {}", "{} over {}", "{} on top of {}"),
    "below": ("{} below {}", "{} under {}", "{} beneath {}"),
}

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _noun(thing: Thing, colour: bool, count: int = 1, size: bool = False) -> str:
    """A noun phrase: "a small red star", "three stars"."""
    words = [thing.size] if size and thing.size else []
    words += [thing.colour] if colour else []
    if count > 1:
        return " ".join([NUMBERS[count], *words, _plural(thing.shape)])
    words.append(thing.shape)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(
    scene: Scene, rng: np.random.Generator, complete: bool = False, coloured: float = 0.8
) -> str:
    """Describes a scene in one of many phrasings.

    Arguments:
        scene: A scene of one of the four kinds.
        rng: Chooses the phrasing.
        complete: Whether to name every attribute, instead of leaving some out at random.
        coloured: How often an incomplete caption names the colours.
    """
    colour = complete or bool(rng.random() < coloured)
    first = scene.things[0]
    if scene.kind == "single":
        text = _noun(first, colour, size=complete or bool(rng.random() < 0.7))
    elif scene.kind == "count":
        text = _noun(first, colour, len(scene.things))
    else:
        nouns = [_noun(first, colour), _noun(scene.things[1], colour)]
        if scene.kind == "pair":
            rng.shuffle(nouns)
            text = str(rng.choice(_AND)).format(*nouns)
        elif rng.random() < 0.8:
            text = str(rng.choice(_RELATED[scene.relation])).format(*nouns)
        else:  # the same fact, told from the second object
            opposite = OPPOSITE[scene.relation]
            text = str(rng.choice(_RELATED[opposite])).format(*nouns[::-1])
    if complete or rng.random() < 0.5:
        text = str(rng.choice(_BEHIND)).format(text, scene.background)
    return str(rng.choice(_FRAMES)).format(text)


def describe(scene: Scene, colour: bool = True) -> str:
    """Describes the objects of a scene in one plain phrase, with or without their colours."""
    first = scene.things[0]
    if scene.kind in ("single", "count"):
        return _noun(first, colour, len(scene.things))
    joint = _AND[0] if scene.relation is None else _RELATED[scene.relation][0]
    return joint.format(_noun(first, colour), _noun(scene.things[1], colour))
