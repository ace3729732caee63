"""Pixels: draws a scene with anti-aliased OpenCV primitives, plainly or with the variations used in training."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.demo_model.scenes import CANVAS, Rgb, Scene, Thing

Pixels = NDArray[np.uint8]

# OpenCV takes sub-pixel positions as fixed-point integers with this many fractional bits.
FRACTION_BITS = 4


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
