"""Initial values that let so small a model learn in minutes: whitened patches and positions that know the grid.

Stock Idefics2 sets all perceiver latents to ones, so that they start identical and must first drift apart; here they
start as positions. Only values change, never code or shapes.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from worker.demo_model.scenes import Pixels, draw_varied, make_dense_scene

PATCH_SAMPLE_SEED, PATCH_SAMPLE_SCENES = 77, 600
PATCH_GAIN, RIDGE = 0.5, 0.02


def to_tensor(pictures: list[Pixels]) -> Tensor:
    """RGB bytes `[h, w, 3]` as one `[n, 3, h, w]` in −1 … 1, as the processor does it."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (stacked / 255 - 0.5) / 0.5


def initialise(model: Any, grid: int) -> None:
    """Replace the stock values of latents, positions and patch embedding. `grid` is patches per side."""
    vision, latents = model.model.vision_model.embeddings, model.model.connector.perceiver_resampler.latents
    with torch.no_grad():
        latents.copy_(sine_positions(grid, latents.shape[1]) + 0.1 * torch.randn(latents.shape))
        positions = vision.position_embedding.weight
        positions.copy_(0.5 * sine_positions(grid, positions.shape[1]))
    whiten_patches(vision.patch_embedding)


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed two-dimensional sine and cosine positions `[grid * grid, width]`, row by row.

    Sines of x, cosines of x, sines of y, cosines of y at frequencies falling from 1 to 1/100: Vaswani et al. 2017
    (arXiv:1706.03762) §3.5, in the two-dimensional form of He et al. 2021 (arXiv:2111.06377).
    """
    y, x = np.mgrid[0:grid, 0:grid].reshape(2, -1).astype(np.float64)
    quarter = width // 4
    frequencies = 10.0 ** (-2 * np.arange(quarter) / quarter)
    angles = [axis[:, None] * frequencies * 4 * np.pi / grid for axis in (x, y)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(parts, axis=1), dtype=torch.float32)


def whiten_patches(embedding: torch.nn.Conv2d) -> None:
    """Start the patch embedding as PCA whitening of drawn patches: decorrelated inputs of equal variance.

    The data-dependent initialisation of Krähenbühl et al. 2015 (arXiv:1511.06856) in its PCA form: rows are the
    leading eigenvectors of the patches' covariance over the root of their eigenvalues, here with a ridge so that
    noise directions are not blown up.
    """
    rng = Random(PATCH_SAMPLE_SEED)
    pictures = to_tensor([draw_varied(make_dense_scene(rng), rng) for _ in range(PATCH_SAMPLE_SCENES)])
    size = embedding.kernel_size[0]
    patches = F.unfold(pictures, size, stride=size).transpose(1, 2).reshape(-1, 3 * size * size).double()
    mean = patches.mean(0)
    centred = patches - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = min(embedding.out_channels, len(variances))
    variances, directions = variances.flip(0)[:kept], directions.flip(1)[:, :kept]
    weight = PATCH_GAIN * (directions / (variances + RIDGE * variances.mean()).sqrt()).T
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[:kept] = weight.view(kept, 3, size, size).float()
        if embedding.bias is not None:
            embedding.bias.zero_()
            embedding.bias[:kept] = -(weight @ mean).float()
