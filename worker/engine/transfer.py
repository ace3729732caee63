"""Moves small tensors between host and device without making one wait for the other."""

from __future__ import annotations

import torch
from torch import Tensor


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
