"""Draws scenes as 64x64 images, from signed distance functions.

The distance to an outline gives its anti-aliasing, darker rim and soft shadow analytically, so no
image file is needed and a scene takes about two milliseconds.
"""

__all__ = ["OUTLINES", "draw", "draw_many"]

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy import ndarray as Array

from bf_lib.scenes import BACKGROUNDS, COLOURS, SIZE, Scene, Thing

# Outlines: signed distance to the outline in units of the radius, negative inside.
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


OUTLINES: dict[str, Callable[[Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(_spokes(3, 1.05) + (0, 0.18)),
    "star": _polygon(_spokes(10, 1.05, 0.45)),
    "heart": _polygon(_heart_outline()),
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}

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
    sdf, reach = OUTLINES[thing.shape], thing.radius * 1.1 + 5
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
