"""Direct teaching of the captioner's tower: linear heads that say what lies in each cell of the 4 × 4 grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from worker.demo_model.learning.architecture import VISION_WIDTH
from worker.demo_model.learning.supervision import (
    BACKGROUND_WEIGHT,
    EMPTY_PATCH_WEIGHT,
    NUM_COLOURS,
    NUM_SHAPES,
    OFFSET_WEIGHT,
    Targets,
    VisionLoss,
    cell_loss,
)
from worker.demo_model.scenes import BACKGROUNDS


class PatchHeads(nn.Module):
    """One linear read-out per patch and one of the class vector; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(VISION_WIDTH, NUM_COLOURS + NUM_SHAPES + 2)
        self.background = nn.Linear(VISION_WIDTH, len(BACKGROUNDS))


def seeing_loss(heads: PatchHeads, seen: Tensor, truth: Targets) -> VisionLoss:
    """Classify every cell's colour, shape and offset from its patch of `seen` `[n, 17, 192]`, and the background."""
    colour, shape, offset = heads.patch(seen[:, 1:]).split((NUM_COLOURS, NUM_SHAPES, 2), dim=-1)
    occupied = truth.colour > 0
    loss = cell_loss(colour, shape, truth, EMPTY_PATCH_WEIGHT)
    loss = loss + OFFSET_WEIGHT * F.smooth_l1_loss(offset[occupied], truth.offset[occupied], beta=0.1)
    loss = loss + BACKGROUND_WEIGHT * F.cross_entropy(heads.background(seen[:, 0]), truth.background)
    is_right = (colour.argmax(-1) == truth.colour) & (shape.argmax(-1) == truth.shape)
    return VisionLoss(loss, is_right[occupied].float().mean().item())


def offset_error(heads: PatchHeads, seen: Tensor, truth: Targets) -> float:
    """Mean distance along one axis between the read and the true centre, in canvas units."""
    offset = heads.patch(seen[:, 1:])[..., -2:]
    occupied = truth.colour > 0
    return 16 * torch.mean((offset[occupied] - truth.offset[occupied]).abs()).item()
