"""Weights in fewer bits: int8 through optimum-quanto, nf4 with double quantisation through bitsandbytes.

Linear layers are quantised while they are loaded; embeddings, norms and the output head keep their type. Both
libraries run on CPUs too, slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, QuantoConfig

from worker.errors import CannotStart
from worker.settings import Quantization

#: Package to import and distribution to install, per kind of quantised weights.
_PACKAGES = {
    Quantization.INT8: ("optimum.quanto", "optimum-quanto"),
    Quantization.NF4: ("bitsandbytes", "bitsandbytes"),
}
#: Bytes per weight; nf4 adds an 8-bit scale per block of 64 and a 32-bit one per 256 of those (arXiv:2305.14314 §3).
_BYTES_PER_WEIGHT = {Quantization.INT8: 1.0, Quantization.NF4: 0.5 + 1 / 64 + 4 / (64 * 256)}


def quantization_config(kind: Quantization, dtype: torch.dtype) -> QuantoConfig | BitsAndBytesConfig | None:
    """Return what transformers is told; `dtype` is the type that nf4 computes in.

    Raises CannotStart when the library is not installed.
    """
    if kind is Quantization.NONE:
        return None
    module, distribution = _PACKAGES[kind]
    if not _can_import(module):
        raise CannotStart(f"VISIONQ_QUANTIZATION={kind}: needs {distribution}; install the `quantization` extra")
    if kind is Quantization.INT8:
        return QuantoConfig(weights="int8")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def expected_bytes(model: PreTrainedModel, kind: Quantization, dtype: torch.dtype) -> int:
    """Return what the weights of a model that is still on the meta device will take."""
    head = model.get_output_embeddings()
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head and kind is not Quantization.NONE
    }
    return int(
        sum(
            weight.numel() * (_BYTES_PER_WEIGHT[kind] if id(weight) in linear else dtype.itemsize)
            for weight in model.parameters()
        )
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that parameters and buffers take as they are stored, scales of quantised ones included.

    transformers' get_memory_footprint counts an int8 weight as what it stands for and forgets the scales of nf4.
    """
    stored: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sum(part.numel() * part.element_size() for tensor in stored for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):  # how a wrapper tells what it holds (torch.utils._python_dispatch)
        names, _ = tensor.__tensor_flatten__()
        yield from (getattr(tensor, name) for name in names)
        return
    yield tensor
    scales = getattr(tensor, "quant_state", None)  # bitsandbytes keeps them beside the parameter
    if scales is not None:
        yield from (part for part in scales.as_dict().values() if isinstance(part, Tensor))


def _can_import(module: str) -> bool:
    parent, _, child = module.partition(".")
    return find_spec(parent) is not None and (not child or find_spec(module) is not None)
