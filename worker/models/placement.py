"""The devices of the weights, and the attention implementation.

Devices: a CPU, one GPU or, when the weights do not fit one, all visible GPUs. In: VISIONQ_DEVICE and the free memory.
Out: a `Placement`, whose options transformers and accelerate apply. Attention: flash-attn where it can be imported and
used, else SDPA or what the family supports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.settings import Attention

logger = logging.getLogger(__name__)

_HALF_PRECISION: Final = (torch.float16, torch.bfloat16)
#: flash-attn 2 has kernels for Ampere and newer (its README, "NVIDIA CUDA Support").
_MIN_CAPABILITY: Final = (8, 0)

#: Share of a GPU's free memory that weights may take; KV rows, images and activations need the rest.
WEIGHTS_SHARE = 0.8
GIBIBYTE = 1024**3
_CHOICES = "use auto, balanced, cpu, cuda or cuda:N"


def attention_name(
    wanted: Attention, architecture: type[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return the name for transformers; None lets it choose between SDPA and eager (GIT has no SDPA).

    Raises CannotStart when flash-attn is wanted and cannot be used.
    """
    if wanted in (Attention.SDPA, Attention.EAGER):
        return wanted.value
    obstacle = _flash_obstacle(device, dtype)
    if wanted is Attention.FLASH and obstacle is not None:
        raise CannotStart(
            f"VISIONQ_ATTENTION={wanted}: needs a CUDA device, half precision and the flash-attn package; {obstacle}"
        )
    is_flash = wanted is Attention.FLASH or (obstacle is None and architecture._supports_flash_attn)
    return Attention.FLASH.value if is_flash else None


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why flash-attn cannot be used, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in _HALF_PRECISION:
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        # It is compiled for one version of torch and fails to import with another.
        import_module("flash_attn")
    except (ImportError, OSError) as error:
        logger.warning("flash-attn cannot be imported", extra={"action": "load", "error": str(error)})
        return "flash-attn is installed and cannot be imported"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is too old for it"
    return None


@dataclass(frozen=True, slots=True)
class Placement:
    """device: of the model's inputs. options: arguments of `from_pretrained`."""

    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)


def place(value: str, free_bytes: Mapping[int, int], num_weight_bytes: Callable[[], int]) -> Placement:
    """Return the placement that VISIONQ_DEVICE asks for.

    `free_bytes`: the free memory of each visible GPU. `num_weight_bytes` is called only if the answer depends on it.
    `auto` is the first GPU unless the weights need several; `balanced` always uses several.
    Raises CannotStart for a device that does not exist and for weights that do not fit.
    """
    if value == "auto" and not free_bytes:
        return Placement(torch.device("cpu"))
    if value == "balanced" or (value == "auto" and len(free_bytes) > 1):
        return _on_several(value, free_bytes, num_weight_bytes())
    return _on_one(_device("cuda" if value == "auto" else value, len(free_bytes)))


def free_gpu_bytes() -> dict[int, int]:
    """Return the free memory of each visible GPU, by its number."""
    return {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}


def require_on_gpus(value: str, model: PreTrainedModel) -> None:
    """Raise CannotStart if accelerate has put a part of the model on a CPU or a disk, which would slow every token."""
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
    # Loaded directly onto the GPU, without a copy of the weights in host memory.
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
