"""Small tensors: moved between host and device without making one wait for the other, and compared.

Two results count as the same when they differ by rounding only, as two ways of computing one thing do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: How far outputs may lie apart, as a share of the largest.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device. On CUDA through pinned memory: from pageable memory a copy would wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a device tensor on its way to the host. It is taken in stream order, when this object is made."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            # Whoever made the tensor may go on writing to it.
            self._copy = tensor.cpu().clone()
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> list[int]:
        """Return the numbers, waiting until they have come. Raises what the device raises for the work before it."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._copy.tolist()
        return numbers


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
