"""When two ways of computing the same thing count as the same: they differ by rounding, not by an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: How far outputs may lie apart, as a share of the largest.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the coarsest type that a model's layers compute in; asked after its first forward.

    With nf4 weights that it has packed for AVX512-BF16, bitsandbytes 0.50 multiplies in bfloat16, whatever the type of
    their input: rows of one batch and of another then differ by that type's rounding.
    """
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    is_packed = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return torch.bfloat16 if is_packed else model.dtype


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
