"""When two ways of computing the same thing count as the same: they differ by rounding, not by an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

#: How far outputs may lie apart, as a share of the largest.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have one shape and lie within the tolerance of their type; whole numbers must be equal."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if one.numel() == 0:
        return True
    largest = one.float().abs().max()
    return bool((one.float() - other.float()).abs().max() <= TOLERANCE.get(one.dtype, 0.0) * largest)
