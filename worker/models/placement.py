"""Where the weights go: a CPU, one GPU, or, when they do not fit one, all GPUs that this process sees.

In: VISIONQ_DEVICE and what is free. Out: a `Placement`, whose options transformers and accelerate carry out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from worker.errors import CannotStart

#: Share of a GPU's free memory that weights may take; KV rows, images and activations need the rest.
WEIGHTS_SHARE = 0.8
GIBIBYTE = 1024**3

_CHOICES = "use auto, balanced, cpu, cuda or cuda:N"


@dataclass(frozen=True, slots=True)
class Placement:
    """device: where inputs go first. options: what `from_pretrained` is told."""

    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)


def place(value: str, free_bytes: Mapping[int, int], num_weight_bytes: Callable[[], int]) -> Placement:
    """Return the placement that VISIONQ_DEVICE asks for.

    `free_bytes` holds the free memory of each GPU in sight. `num_weight_bytes` is asked only when it matters.
    `auto` takes the first GPU unless the weights need several; `balanced` always spreads them.
    Raises CannotStart for what is not there and for weights that do not fit.
    """
    if value == "auto" and not free_bytes:
        return Placement(torch.device("cpu"))
    if value == "balanced" or (value == "auto" and len(free_bytes) > 1):
        return _on_several(value, free_bytes, num_weight_bytes())
    return _on_one(_device("cuda" if value == "auto" else value, len(free_bytes)))


def free_gpu_bytes() -> dict[int, int]:
    """Return the free memory of each GPU that this process sees, by its number."""
    return {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}


def require_on_gpus(value: str, model: PreTrainedModel) -> None:
    """Refuse a spread model of which accelerate has left a part on a CPU or a disk: each token would wait for it."""
    devices = {name: str(device) for name, device in getattr(model, "hf_device_map", {}).items()}
    elsewhere = [name or "everything" for name, device in devices.items() if device in ("cpu", "disk")]
    if elsewhere and set(devices.values()) != {"cpu"}:
        raise CannotStart(f"VISIONQ_DEVICE={value}: the GPUs are too small; left over: {', '.join(elsewhere[:3])}")


def _device(value: str, num_gpus: int) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise CannotStart(f"VISIONQ_DEVICE={value}: not a device; {_CHOICES}") from error
    if device.type not in ("cpu", "cuda"):
        raise CannotStart(f"VISIONQ_DEVICE={value}: not supported; {_CHOICES}")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise CannotStart(f"VISIONQ_DEVICE={value}: no such CUDA device; torch sees {num_gpus}")
    return device


def _on_one(device: torch.device) -> Placement:
    # Straight onto the GPU: no second copy of the weights in host memory.
    return Placement(device, {"device_map": {"": device}} if device.type == "cuda" else {})


def _on_several(value: str, free_bytes: Mapping[int, int], num_bytes: int) -> Placement:
    if len(free_bytes) < 2:
        raise CannotStart(f"VISIONQ_DEVICE={value}: needs several CUDA devices; torch sees {len(free_bytes)}")
    limits = {number: int(free * WEIGHTS_SHARE) for number, free in free_bytes.items()}
    if value == "auto" and num_bytes <= limits[0]:
        return _on_one(torch.device("cuda:0"))
    if num_bytes > sum(limits.values()):
        raise CannotStart(
            f"VISIONQ_DEVICE={value}: weights of {num_bytes / GIBIBYTE:.1f} GiB do not fit {len(limits)} GPUs, which "
            f"have {sum(limits.values()) / GIBIBYTE:.1f} GiB for them; see VISIONQ_QUANTIZATION and VISIONQ_DTYPE"
        )
    return Placement(torch.device("cuda:0"), {"device_map": "balanced", "max_memory": limits})
