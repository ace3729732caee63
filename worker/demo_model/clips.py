"""Clips: one shape that moves, changes its colour or keeps still over several frames, perhaps beside a second shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from worker.demo_model.scenes import (
    CANVAS,
    COLOUR_JITTER,
    COLOURS,
    MAX_RADIUS,
    MIN_RADIUS,
    SHAPES,
    Scene,
    Thing,
    distance_squared,
    inner_range,
    make_background,
    make_thing,
    shade,
)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MIN_TRAVEL = 18.0
MIN_GAP = 22.0

Point = tuple[float, float]


class Action(StrEnum):
    """What the main shape of a clip does."""

    MOVE = "move"
    TURN = "turn"
    STILL = "still"


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames in time order and what happens in them. `direction` is set when the shape moves."""

    frames: tuple[Scene, ...]
    action: Action
    direction: str | None
    shape: str
    first_colour: str
    last_colour: str


def make_clip(rng: Random, num_frames: int | None = None, action: Action | None = None, *, wobble: float = 1.0) -> Clip:
    """A random clip; two to eight frames unless told.

    `wobble` scales how much the shape trembles besides its action: 1 as in training, 0 for smooth footage.
    """
    num = num_frames or rng.choices((2, 3, 4, 5, 6, 8), (8, 10, 55, 8, 9, 10))[0]
    action = action or rng.choices((Action.MOVE, Action.TURN, Action.STILL), (62, 24, 14))[0]
    background, background_rgb = make_background(rng)
    has_bystander = rng.random() < 0.35 and action is not Action.STILL
    while True:
        colour, other_colour, new_colour = rng.sample(list(COLOURS), 3)
        shape, other_shape = rng.sample(SHAPES, 2)
        radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
        direction, path = _path(rng, action, num, radius, wobble)
        turning_frame = rng.randint(1, num - 1)
        bystanders = (make_thing(rng, other_colour, other_shape),) if has_bystander else ()
        if all(distance_squared(thing, point) >= MIN_GAP**2 for thing in bystanders for point in path):
            break
    before = Thing(colour, shape, CANVAS / 2, CANVAS / 2, radius, shade(rng, COLOURS[colour], COLOUR_JITTER))
    after = before
    new_rgb = shade(rng, COLOURS[new_colour], COLOUR_JITTER)
    if action is Action.TURN:
        after = replace(before, colour=new_colour, rgb=new_rgb)
    frames = tuple(
        Scene((replace(before if i < turning_frame else after, x=x, y=y), *bystanders), background, background_rgb)
        for i, (x, y) in enumerate(path)
    )
    return Clip(frames, action, direction, shape, before.colour, after.colour)


def _path(rng: Random, action: Action, num_frames: int, radius: float, wobble: float) -> tuple[str | None, list[Point]]:
    low, high = inner_range(radius)
    if action is not Action.MOVE:
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        return None, [(x + wobble * rng.uniform(-1, 1), y + wobble * rng.uniform(-1, 1)) for _ in range(num_frames)]
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    travel = rng.uniform(MIN_TRAVEL, high - low)
    start = rng.uniform(low, high - travel)
    lane = rng.uniform(low + 2, high - 2)
    steps = [i / (num_frames - 1) for i in range(num_frames)]
    along = [start + travel * (t if dx + dy > 0 else 1 - t) for t in steps]
    across = [lane + wobble * rng.uniform(-1.5, 1.5) for _ in steps]
    return direction, list(zip(along, across, strict=True)) if dx else list(zip(across, along, strict=True))
