"""Direct teaching of the vision side: linear heads that say what lies in each cell of a 4 × 4 grid.

Captions alone do not teach the tower to see in minutes; these targets do. The heads are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from worker.demo_model.learning.architecture import GRID, TEXT_WIDTH, VISION_WIDTH, ImageFeatures
from worker.demo_model.scenes import BACKGROUNDS, CANVAS, COLOURS, SHAPES, Scene

NUM_COLOURS, NUM_SHAPES = len(COLOURS) + 1, len(SHAPES) + 1  # zero means nothing there
EMPTY_LATENT_WEIGHT, EMPTY_PATCH_WEIGHT = 0.15, 0.2
OFFSET_WEIGHT, BACKGROUND_WEIGHT, PATCH_WEIGHT = 2.0, 0.3, 0.7


@dataclass(frozen=True, slots=True)
class Targets:
    """What is centred in each cell of `n` scenes: `colour` and `shape` `[n, 16]` with 0 for nothing, `offset`
    `[n, 16, 2]` from the cell's middle in cells, `background` `[n]`."""

    colour: Tensor
    shape: Tensor
    offset: Tensor
    background: Tensor


@dataclass(frozen=True, slots=True)
class VisionLoss:
    """The loss, and the share of things whose cell got both colour and shape right."""

    loss: Tensor
    object_accuracy: float


class Heads(nn.Module):
    """One linear read-out per latent, per patch, and per image."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(TEXT_WIDTH, NUM_COLOURS + NUM_SHAPES + 2)
        self.patch = nn.Linear(VISION_WIDTH, NUM_COLOURS + NUM_SHAPES)
        self.background = nn.Linear(TEXT_WIDTH, len(BACKGROUNDS))


def targets(scenes: Sequence[Scene]) -> Targets:
    """The truth of every cell."""
    num, cell = len(scenes), CANVAS / GRID
    colour = torch.zeros(num, GRID * GRID, dtype=torch.long)
    shape, offset = torch.zeros_like(colour), torch.zeros(num, GRID * GRID, 2)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            column, row = (min(GRID - 1, max(0, int(value // cell))) for value in (thing.x, thing.y))
            j = row * GRID + column
            colour[i, j] = list(COLOURS).index(thing.colour) + 1
            shape[i, j] = SHAPES.index(thing.shape) + 1
            offset[i, j] = torch.tensor((thing.x / cell - column - 0.5, thing.y / cell - row - 0.5))
    background = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
    return Targets(colour, shape, offset, background)


def vision_loss(heads: Heads, features: ImageFeatures, truth: Targets) -> VisionLoss:
    """Classify every cell's colour and shape from its latent and its patch, its offset, and the background."""
    read = heads.latent(features.latents)
    colour, shape, offset = read.split((NUM_COLOURS, NUM_SHAPES, 2), dim=-1)
    occupied = truth.colour > 0
    loss = cell_loss(colour, shape, truth, EMPTY_LATENT_WEIGHT)
    loss = loss + OFFSET_WEIGHT * F.smooth_l1_loss(offset[occupied], truth.offset[occupied], beta=0.1)
    background = heads.background(features.latents.mean(1))
    loss = loss + BACKGROUND_WEIGHT * F.cross_entropy(background, truth.background)
    patch_colour, patch_shape = heads.patch(features.patches).split((NUM_COLOURS, NUM_SHAPES), dim=-1)
    loss = loss + PATCH_WEIGHT * cell_loss(patch_colour, patch_shape, truth, EMPTY_PATCH_WEIGHT)
    is_right = (colour.argmax(-1) == truth.colour) & (shape.argmax(-1) == truth.shape)
    return VisionLoss(loss, is_right[occupied].float().mean().item())


def cell_loss(colour: Tensor, shape: Tensor, truth: Targets, empty_weight: float) -> Tensor:
    """Cross entropies averaged over cells, empty ones counting less: most cells are empty."""
    weight = torch.where(truth.colour > 0, 1.0, empty_weight)
    per_cell = F.cross_entropy(colour.mT, truth.colour, reduction="none")
    per_cell = per_cell + F.cross_entropy(shape.mT, truth.shape, reduction="none")
    return (per_cell * weight).sum() / weight.sum()
