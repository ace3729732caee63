"""Muon in single precision: momentum, orthogonalised before it is applied to a matrix.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the update scaled to AdamW's root mean square as
in Liu et al. 2025 (arXiv:2502.16982). torch's own `Muon` computes the same in bfloat16, which is emulated on CPUs
without such instructions and then takes two thirds of a training step of this small model; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """For matrices only. Weight decay is decoupled, momentum is Nesterov's."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, *, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - momentum)
                update = orthogonal(weight.grad.lerp(average, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * ADAMW_RMS * math.sqrt(max(weight.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are about one (0.7 … 1.2), by a quintic Newton–Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
