"""Scenes: one to five coloured shapes on a plain background, drawn at random from a seeded generator; and their pixels.

Coordinates are units of a 64 × 64 canvas, y pointing down. The same `random.Random` state gives the same scene on
every platform. Pixels come from anti-aliased OpenCV primitives, plainly or with the variations used in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]

CANVAS = 64
COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 225, 50),
    "purple": (130, 45, 165),
    "orange": (245, 135, 25),
    "cyan": (60, 210, 225),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUNDS: dict[str, Rgb] = {"white": (245, 245, 245), "gray": (120, 120, 120), "black": (15, 15, 15)}

MIN_RADIUS, MAX_RADIUS = 8.0, 12.0
COLOUR_JITTER, BACKGROUND_JITTER = 12, 10
# Two shapes stand in a relation only when one axis dominates by this much; nobody argues about such a scene.
CLEAR_MARGIN = 8.0
MIN_DISTANCE, MIN_DENSE_DISTANCE = 23.0, 22.7

# OpenCV takes sub-pixel positions as fixed-point integers with this many fractional bits.
FRACTION_BITS = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: `colour` is the name a question uses, `rgb` the shade that is drawn."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: Rgb

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        """`a red circle`."""
        return with_article(self.name)


@dataclass(frozen=True, slots=True)
class Scene:
    """Things on a background."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: Rgb


def with_article(name: str) -> str:
    """`a red circle`, `an orange star`."""
    return f"{'an' if name.startswith('orange') else 'a'} {name}"


def relation(subject: Thing, other: Thing) -> str | None:
    """Where `subject` is as seen from `other`: `left of`, `right of`, `above`, `below`, or None when it is unclear."""
    dx, dy = other.x - subject.x, other.y - subject.y
    if abs(dx) >= abs(dy) + CLEAR_MARGIN:
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= abs(dx) + CLEAR_MARGIN:
        return "above" if dy > 0 else "below"
    return None


def make_scene(rng: Random, num_things: int | None = None, *, distinct_shapes: bool = False) -> Scene:
    """One to three things of different colours, far enough apart that caption and relations are unambiguous.

    Three quarters of the scenes have different shapes too; `distinct_shapes` makes that all of them.
    """
    num = num_things or rng.choices((1, 2, 3), (30, 45, 25))[0]
    while True:
        colours = rng.sample(list(COLOURS), num)
        if distinct_shapes or rng.random() < 0.75:
            shapes = rng.sample(SHAPES, num)
        else:
            shapes = [rng.choice(SHAPES) for _ in range(num)]
        things = tuple(make_thing(rng, colour, shape) for colour, shape in zip(colours, shapes, strict=True))
        if _is_unambiguous(things):
            background, rgb = make_background(rng)
            return Scene(things, background, rgb)


def make_dense_scene(rng: Random) -> Scene:
    """Up to five things, colours and shapes repeating freely: dense supervision for the vision phase of training."""
    num = rng.choice((3, 4, 4, 5))
    things: list[Thing] = []
    for _ in range(60):
        if len(things) == num:
            break
        thing = make_thing(rng, rng.choice(list(COLOURS)), rng.choice(SHAPES))
        if all(distance_squared(thing, (other.x, other.y)) > MIN_DENSE_DISTANCE**2 for other in things):
            things.append(thing)
    background, rgb = make_background(rng)
    return Scene(tuple(things), background, rgb)


def make_thing(rng: Random, colour: str, shape: str) -> Thing:
    """A thing at a random place, wholly inside the canvas."""
    radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
    low, high = inner_range(radius)
    return Thing(
        colour=colour,
        shape=shape,
        x=rng.uniform(low, high),
        y=rng.uniform(low, high),
        radius=radius,
        rgb=shade(rng, COLOURS[colour], COLOUR_JITTER),
    )


def make_background(rng: Random) -> tuple[str, Rgb]:
    """A background's name and its shade."""
    name = rng.choice(list(BACKGROUNDS))
    return name, shade(rng, BACKGROUNDS[name], BACKGROUND_JITTER)


def inner_range(radius: float) -> tuple[float, float]:
    """Lowest and highest centre that keeps a shape of this radius inside the canvas with two units to spare."""
    return radius + 2, CANVAS - 1 - (radius + 2)


def shade(rng: Random, rgb: Rgb, jitter: int) -> Rgb:
    """The colour moved by up to `jitter` per channel."""
    red, green, blue = (min(255, max(0, value + rng.randint(-jitter, jitter))) for value in rgb)
    return red, green, blue


def distance_squared(thing: Thing, point: tuple[float, float]) -> float:
    """Squared distance of a thing's centre to a point, in canvas units."""
    return (thing.x - point[0]) ** 2 + (thing.y - point[1]) ** 2


def _is_unambiguous(things: Sequence[Thing]) -> bool:
    if any(distance_squared(a, (b.x, b.y)) <= MIN_DISTANCE**2 for a, b in combinations(things, 2)):
        return False
    if len(things) == 2:
        return relation(*things) is not None
    if len(things) == 3:  # captions of three list them from left to right
        columns = sorted(thing.x for thing in things)
        return all(right - left > CLEAR_MARGIN for left, right in pairwise(columns))
    return True


Pixels = NDArray[np.uint8]


def draw(scene: Scene, size: int = 200) -> Pixels:
    """The scene as `[size, size, 3]` RGB bytes."""
    scale = size / CANVAS
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = scene.background_rgb
    for thing in scene.things:
        _draw_thing(pixels, thing, scale)
    return pixels


def draw_varied(scene: Scene, rng: Random) -> Pixels:
    """The scene at the model's 64 × 64, drawn at 1–4× and reduced, sometimes through JPEG, sometimes with noise."""
    scale = rng.choice((1, 2, 2, 4))
    pixels = draw(scene, CANVAS * scale)
    if scale > 1:
        is_area = rng.random() < 0.5 or scale > 2
        how = cv2.INTER_AREA if is_area else cv2.INTER_LINEAR_EXACT
        pixels = np.asarray(cv2.resize(pixels, (CANVAS, CANVAS), interpolation=how), np.uint8)
    if rng.random() < 0.08:
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, rng.randint(70, 95)])
        pixels = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)
    if rng.random() < 0.2:
        deviation = rng.uniform(1, 4)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, deviation, pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels


def _draw_thing(pixels: Pixels, thing: Thing, scale: float) -> None:
    x, y = (value * scale + (scale - 1) / 2 for value in (thing.x, thing.y))  # canvas units are pixel centres
    radius = thing.radius * scale
    if thing.shape == "circle":
        unit = 1 << FRACTION_BITS
        centre = (round(x * unit), round(y * unit))
        cv2.circle(pixels, centre, int(radius * 0.95 * unit), thing.rgb, -1, cv2.LINE_AA, FRACTION_BITS)
        return
    for corners in _polygons(thing.shape):
        _fill(pixels, corners * radius + (x, y), thing.rgb)


def _polygons(shape: str) -> list[NDArray[np.float64]]:
    """Corners `[n, 2]` of the polygons that make up a shape of radius one around the origin."""
    if shape == "square":
        return [_rectangle(0.85, 0.85)]
    if shape == "triangle":
        return [np.array([(0, -1), (1, 0.8), (-1, 0.8)])]
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        return [np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)]
    if shape == "cross":
        return [_rectangle(1, 0.32), _rectangle(0.32, 1)]
    raise ValueError(f"unknown shape {shape!r}")


def _rectangle(half_width: float, half_height: float) -> NDArray[np.float64]:
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (half_width, half_height)


def _fill(pixels: Pixels, corners: NDArray[np.float64], rgb: Rgb) -> None:
    fixed = np.round(corners * (1 << FRACTION_BITS)).astype(np.int32)
    cv2.fillPoly(pixels, [fixed], rgb, cv2.LINE_AA, FRACTION_BITS)
