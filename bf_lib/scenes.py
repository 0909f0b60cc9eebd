"""The world of `mini`: procedurally drawn 64x64 scenes, their captions, and what is held out.

A scene holds one to four objects, each with a shape, a colour, a size and a place, before a shaded
background. Everything is drawn from signed distance functions, so edges are anti-aliased
analytically and no image file is needed. The scene itself is the ground truth: a judge can be
trained on it and a generated image checked against it, task by task as in GenEval (Ghosh et al.,
"GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", 2023,
https://arxiv.org/abs/2310.11513).

Three kinds of combination never occur in training, so that compositional generalisation can be
measured: some colours of some shapes, some counts of some shapes, and some pairs of shapes.
"""

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "Scene",
    "Thing",
    "caption",
    "describe",
    "draw",
    "draw_many",
    "is_held_out",
    "relation_of",
    "sample_medley",
    "sample_scene",
]

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array


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


# Shapes: signed distance to the outline in units of the radius, negative inside.
# `p` holds points with shape (2, *); y points down.


def _circle(p: Array) -> Array:
    return np.hypot(*p) - 0.92


def _ring(p: Array) -> Array:
    return np.abs(np.hypot(*p) - 0.70) - 0.25


def _box(p: Array, half: tuple[float, float]) -> Array:
    q = np.abs(p) - np.reshape(half, (2,) + (1,) * (p.ndim - 1))
    return np.hypot(*np.maximum(q, 0)) + np.minimum(q.max(axis=0), 0)


def _square(p: Array) -> Array:
    return _box(p, (0.72, 0.72)) - 0.06


def _cross(p: Array) -> Array:
    return np.minimum(_box(p, (0.92, 0.27)), _box(p, (0.27, 0.92))) - 0.04


def _moon(p: Array) -> Array:
    """A disc of radius 0.95 bitten by one of radius 0.72, whose edges meet in two exact tips."""
    outer, inner, apart = 0.95, 0.72, 0.45
    x, y = p[0] - 0.10, np.abs(p[1])
    tip_x = (outer**2 - inner**2 + apart**2) / (2 * apart)
    tip_y = math.sqrt(outer**2 - tip_x**2)
    beyond = apart * (x * tip_y - y * tip_x) > apart**2 * np.maximum(tip_y - y, 0)
    body = np.maximum(np.hypot(x, y) - outer, inner - np.hypot(x - apart, y))
    return np.where(beyond, np.hypot(x - tip_x, y - tip_y), body)


def _polygon(corners: Array) -> Callable[[Array], Array]:
    """Returns the signed distance to a simple polygon with corners of shape (n, 2)."""
    starts, ends = corners, np.roll(corners, -1, axis=0)

    def distance(p: Array) -> Array:
        nearest, inside = np.full(p.shape[1:], np.inf), np.zeros(p.shape[1:], bool)
        for a, b in zip(starts, ends, strict=True):
            edge = b - a
            x, y = p[0] - a[0], p[1] - a[1]
            along = np.clip((x * edge[0] + y * edge[1]) / (edge @ edge), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - along * edge[0], y - along * edge[1]))
            crosses = (p[1] >= a[1]) != (p[1] >= b[1])
            inside ^= crosses & ((x * edge[1] > y * edge[0]) == (edge[1] < 0))
        return np.where(inside, -nearest, nearest)

    return distance


def _spokes(count: int, *radii: float) -> Array:
    """Corners at equal angles, first one up, with radii taken in turn."""
    angle = 2 * np.pi * np.arange(count) / count
    radius = np.resize(radii, count)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _heart_outline() -> Array:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16.5


SHAPES: dict[str, Callable[[Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(_spokes(3, 1.05) + (0, 0.18)),
    "star": _polygon(_spokes(10, 1.05, 0.45)),
    "heart": _polygon(_heart_outline()),
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}

# Each shape misses one colour in training; some miss one count or one partner.
_SHAPE, _COLOUR = list(SHAPES), list(COLOURS)
HELD_COLOURS = frozenset((_COLOUR[(3 * i + 1) % 8], shape) for i, shape in enumerate(_SHAPE))
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
KINDS = {"single": 0.18, "count": 0.27, "pair": 0.20, "relation": 0.35}


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
    """Draws up to six unrelated objects: what a judge must also read, though no caption says it."""
    radii = [float(rng.uniform(6.5, 9.5)) for _ in range(rng.integers(0, 7))]
    things = tuple(
        Thing(
            str(rng.choice(_SHAPE)), str(rng.choice(_COLOUR)), *place, radius, rng.uniform(-1, 1)
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
        looks = [(str(rng.choice(_SHAPE)), str(rng.choice(_COLOUR)), size)]
    elif kind == "count":
        looks = [(str(rng.choice(_SHAPE)), str(rng.choice(_COLOUR)), "")] * int(rng.integers(1, 5))
    else:
        shapes = rng.choice(_SHAPE, 2, replace=False)
        colours = rng.choice(_COLOUR, 2, replace=False)
        looks = [(str(s), str(c), "") for s, c in zip(shapes, colours, strict=True)]
    shrink = 0.85 if len(looks) > 2 else 1.0  # leaves room for three or four
    radii = [shrink * rng.uniform(*SIZES[size]) for *_, size in looks]
    places = _place(rng, radii, relation)
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


# Drawing

_GRID = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)).astype(np.float32)


def draw(scene: Scene) -> Array:
    """Draws a scene.

    Returns:
        The image as uint8 sRGB, with shape (64, 64, 3).
    """
    rng = np.random.default_rng(scene.texture)
    image = _backdrop(np.array(BACKGROUNDS[scene.background], np.float32), rng)
    for thing in scene.things:
        _paint(image, thing, rng)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def draw_many(scenes: Iterable[Scene]) -> Array:
    """Draws scenes into one uint8 array with shape (n, 64, 64, 3)."""
    return np.stack([draw(scene) for scene in scenes])


def _backdrop(colour: Array, rng: np.random.Generator) -> Array:
    """A tinted colour with a slow gradient and faint waves, with shape (64, 64, 3)."""
    unit = _GRID / SIZE - 0.5
    heading = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.22 * (unit[0] * np.cos(heading) + unit[1] * np.sin(heading))
    for _ in range(2):
        wave = rng.uniform(-9, 9, 2)
        light += 0.025 * np.sin(unit[0] * wave[0] + unit[1] * wave[1] + rng.uniform(0, 6.3))
    return (colour + rng.uniform(-6, 6, 3)).astype(np.float32) * light[..., None]


def _paint(image: Array, thing: Thing, rng: np.random.Generator) -> None:
    """Lays one shaded object with a darker rim and a soft shadow over an image, in place."""
    sdf, reach = SHAPES[thing.shape], thing.radius * 1.1 + 5
    left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
    window = (slice(top, int(thing.y + reach) + 1), slice(left, int(thing.x + reach) + 1))
    grid_x, grid_y = _GRID[0][window] - thing.x, _GRID[1][window] - thing.y
    cos, sin = math.cos(thing.tilt), math.sin(thing.tilt)

    def distance(shift: float) -> Array:
        """Signed distance in pixels, the object being moved down and right by `shift` pixels."""
        x, y = (grid_x - shift) / thing.radius, (grid_y - shift) / thing.radius
        return sdf(np.stack([cos * x + sin * y, cos * y - sin * x])) * thing.radius

    inside = distance(0.0)
    shadow = 0.35 * np.clip(0.5 - distance(1.5) / 4, 0, 1)[..., None]
    colour = np.clip(np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-8, 8, 3), 0, 255)
    # Light falls from the upper left; the rim is the darker last pixel of the object.
    slope = (grid_x + grid_y) / (2 * thing.radius)
    light = 1.02 - 0.16 * slope - 0.30 * np.clip(inside + 1.6, 0, 1)
    cover = np.clip(0.5 - inside, 0, 1)[..., None]
    painted = np.clip(colour * light[..., None], 0, 255) * cover
    image[window] = image[window] * (1 - shadow) * (1 - cover) + painted


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

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


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


def caption(scene: Scene, rng: np.random.Generator, complete: bool = False) -> str:
    """Describes a scene in one of many phrasings.

    Arguments:
        scene: A scene of one of the four kinds.
        rng: Chooses the phrasing.
        complete: Whether to name every attribute, instead of leaving some out at random.
    """
    colour = complete or bool(rng.random() < 0.8)
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
            opposite = _OPPOSITE[scene.relation]
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
