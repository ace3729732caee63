"""Which attention code the model runs: flash-attn where it can be imported and used, else SDPA or what a family has."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch
from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.settings import Attention

logger = logging.getLogger(__name__)

_HALF_PRECISION: Final = (torch.float16, torch.bfloat16)
#: flash-attn 2 has kernels for Ampere and newer (its README, "NVIDIA CUDA Support").
_MIN_CAPABILITY: Final = (8, 0)


def attention_name(
    wanted: Attention, architecture: type[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return the name for transformers; None leaves it the choice between SDPA and eager (GIT has no SDPA).

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
        # It is compiled against one version of torch and breaks with the next.
        import_module("flash_attn")
    except (ImportError, OSError) as error:
        logger.warning("flash-attn cannot be imported", extra={"action": "load", "error": str(error)})
        return "flash-attn is installed and cannot be imported"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is too old for it"
    return None
