"""The quantised weights that a QLoRA adapter was trained beside, and how to have exactly them again.

Training writes `quantized_base.json` into the adapter's folder: which layers were nf4, from weights of which type, and
a digest of the values that the quantised weights stand for. Serving rounds the base's weights the same way, keeps the
rounded values as whole weights, and refuses when their digest differs: on other hardware, library or base the adapter
would be added to weights that it was not trained beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.errors import CannotStart
from worker.models.quantization import require_library
from worker.settings import Dtype, Quantization

QUANTIZED_BASE: Final = "quantized_base.json"


class QuantizedBase(BaseModel):
    """What a QLoRA adapter was trained beside.

    dtype: of the weights before they were quantised. layers: names of those that were, in the model's order.
    digest: sha256 over the names and the values, in `dtype`, that the quantised weights stand for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1
    quantization: Literal["nf4"] = "nf4"
    dtype: Literal["float32", "float16", "bfloat16"]
    layers: tuple[str, ...] = Field(min_length=1)
    digest: str

    @property
    def load_as(self) -> Dtype:
        """The type in which the base must be loaded."""
        return Dtype(self.dtype)

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, name: str) -> None:
        """Round the weights of a whole base as training did. Raises CannotStart when they do not become the same."""
        require_library(Quantization.NF4)
        digest = _Digest()
        for layer_name in self.layers:
            layer = _linear(model, layer_name)
            if layer is None or str(layer.weight.dtype).removeprefix("torch.") != self.dtype:
                raise _differs(name, f"{layer_name} is no linear layer in {self.dtype}")
            layer.weight.copy_(_rounded(layer.weight))
            digest.add(layer_name, layer.weight)
        if digest.value != self.digest:
            raise _differs(name, "their digest differs")


def describe_quantized_base(layers: Iterable[tuple[str, nn.Module]]) -> QuantizedBase:
    """Describe the nf4 layers of a base in training, `(name, Linear4bit)` in the model's order.

    The names are those of the base alone, without what PEFT puts around it. Raises ValueError when the layers were
    quantised from several types, or packed for inference, which destroys what they stand for.
    """
    digest, names, dtypes = _Digest(), [], set()
    for name, layer in layers:
        weight: Any = layer.weight
        state = weight.quant_state
        if state is None or getattr(state, "packing_format_for_cpu", False):
            raise ValueError(f"{name} is not quantised, or packed for inference")
        dtypes.add(str(state.dtype).removeprefix("torch."))
        digest.add(name, import_module("bitsandbytes.functional").dequantize_4bit(weight.data, state))
        names.append(name)
    if len(dtypes) != 1:
        raise ValueError(f"weights of one type must be quantised, got {sorted(dtypes)}")
    return QuantizedBase.model_validate({"dtype": dtypes.pop(), "layers": tuple(names), "digest": digest.value})


def write_quantized_base(folder: Path, base: QuantizedBase) -> None:
    """Put the description beside an adapter."""
    (folder / QUANTIZED_BASE).write_text(base.model_dump_json(), encoding="utf-8")


def read_quantized_base(name: str, folder: Path) -> QuantizedBase | None:
    """Return the description beside an adapter; None: there is none. Raises CannotStart for one that is invalid."""
    try:
        return QuantizedBase.model_validate_json((folder / QUANTIZED_BASE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CannotStart(f"VISIONQ_MODEL={name}: {QUANTIZED_BASE} cannot be read") from error


class _Digest:
    """sha256 over names and values. Whatever the device, values of one type have the same bytes."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, name: str, values: Tensor) -> None:
        self._sha256.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        self._sha256.update(values.detach().contiguous().cpu().view(torch.uint8).numpy().data)

    @property
    def value(self) -> str:
        return self._sha256.hexdigest()


def _rounded(weight: Tensor) -> Tensor:
    """Return the values that nf4 with double quantisation keeps of a weight."""
    functional = import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    values: Tensor = functional.dequantize_4bit(packed, state)
    return values


def _linear(model: PreTrainedModel, name: str) -> nn.Linear | None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return None
    return layer if type(layer) is nn.Linear else None


def _differs(name: str, problem: str) -> CannotStart:
    return CannotStart(
        f"VISIONQ_MODEL={name}: the base's weights do not become those that the adapter was trained beside: {problem}"
    )
