"""Quantised weights: int8 by optimum-quanto, nf4 with double quantisation by bitsandbytes.

Linear layers are quantised while they are loaded. Embeddings, norms and the output head keep their type, and so do
layers that the library cannot compute on this device (`can_serve`). Both libraries also run on CPUs, slowly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, QuantoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from worker.errors import CannotStart
from worker.settings import Quantization

#: Package to import and distribution to install, per kind of quantised weights.
_PACKAGES = {
    Quantization.INT8: ("optimum.quanto", "optimum-quanto"),
    Quantization.NF4: ("bitsandbytes", "bitsandbytes"),
}
#: Bytes per weight; nf4 adds an 8-bit scale per block of 64 and a 32-bit one per 256 of those (arXiv:2305.14314 §3).
_BYTES_PER_WEIGHT = {Quantization.INT8: 1.0, Quantization.NF4: 0.5 + 1 / 64 + 4 / (64 * 256)}
#: Bytes per layer: the tables of the 16 values of 4 bits and of the 256 values of 8-bit scales, and a mean; 32 bits
#: each.
_BYTES_PER_LAYER = {Quantization.INT8: 0, Quantization.NF4: 4 * (16 + 256 + 1)}
#: Weights that share one scale in nf4, and rows that bitsandbytes interleaves for AVX512-BF16.
_NF4_BLOCK, _NF4_ROWS = 64, 32
_NUM_NAMES = 3
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """Full names of linear layers, in the model's order; `kept` are patterns as transformers matches them.

    quantised: those that will be. kept: the output head and other modules that transformers never quantises.
    unserved: layers that the library cannot compute on this device.
    """

    quantised: tuple[str, ...]
    kept: tuple[str, ...]
    unserved: tuple[str, ...]

    @property
    def skipped(self) -> list[str]:
        """The patterns of layers that transformers shall not quantise; anchored, because it also matches by suffix."""
        return [*self.kept, *(f"^{re.escape(name)}$" for name in self.unserved)]


def can_serve(
    kind: Quantization, in_features: int, out_features: int, *, device: str, dtype: torch.dtype, packs_nf4: bool
) -> bool:
    """Return whether the library computes a layer of this size correctly on a `device` type in `dtype`.

    nf4, on a CPU with AVX512-BF16 (`packs_nf4`): bitsandbytes 0.50 packs 32 rows together and lays the scales out as
    rows x (columns / 64) at the first forward, which fails for other sizes. Elsewhere it dequantises the weight, which
    works for any size, as does CUDA where its fused kernel needs whole blocks.
    int8, on a CPU in bfloat16: quanto 0.2.7 hands layers whose columns divide by 4 to torch's `_weight_int8pack_mm`,
    which reads 16 columns at a time and past the end of the last row (torch 2.13: a segmentation fault or noise).
    """
    if device != "cpu":
        return True
    if kind is Quantization.NF4:
        return not packs_nf4 or (in_features % _NF4_BLOCK == 0 and out_features % _NF4_ROWS == 0)
    return dtype is not torch.bfloat16 or in_features % 4 != 0 or in_features % 16 == 0


def choose_layers(model: PreTrainedModel, kind: Quantization, dtype: torch.dtype, device: torch.device) -> LayerChoice:
    """Return which linear layers of a model on the meta device are to be quantised for `device`.

    Subclasses of nn.Linear are not quantised: they have a forward of their own or, as in nn.MultiheadAttention, an
    owner that reads their weight. Nor is GPT-2's Conv1D, whose weight is transposed. Raises CannotStart when the
    library is not installed.
    """
    require_library(kind)
    packs_nf4 = kind is Quantization.NF4 and _packs_nf4()
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    quantised: list[str] = []
    unserved: list[str] = []
    for name, module in _linear_layers(model):
        if not should_convert_module(name, kept):
            continue
        is_served = type(module) is nn.Linear and can_serve(
            kind, module.in_features, module.out_features, device=device.type, dtype=dtype, packs_nf4=packs_nf4
        )
        (quantised if is_served else unserved).append(name)
    return LayerChoice(tuple(quantised), tuple(kept), tuple(unserved))


def quantization_config(
    kind: Quantization, dtype: torch.dtype, choice: LayerChoice
) -> QuantoConfig | BitsAndBytesConfig:
    """Return the config for transformers; `dtype` is the compute type of nf4."""
    if kind is Quantization.INT8:
        return QuantoConfig(weights="int8", modules_to_not_convert=choice.skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=choice.skipped,
    )


def guard_inputs(model: PreTrainedModel) -> None:
    """Make the inputs of quantised layers contiguous, and raise TypeError for integer inputs.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 ignores the strides of a transposed input (wrong results, no error), and
    torch's int8 kernel refuses it. A model that casts its input to the dtype of an nf4 weight would make bytes of it.
    """
    for name, module in _linear_layers(model):
        if _is_quantised(module):
            module.register_forward_pre_hook(_Guard(name))


@dataclass(frozen=True, slots=True)
class _Guard:
    """A forward pre-hook of the layer `name`."""

    name: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, *rest = inputs
        if not first.is_floating_point():
            raise TypeError(
                f"the model hands its quantised layer {self.name} {str(first.dtype).removeprefix('torch.')}, the type "
                "of the stored weight; use another VISIONQ_QUANTIZATION"
            )
        return first.contiguous(), *rest


def expected_bytes(model: PreTrainedModel, kind: Quantization, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that the weights of a model on the meta device will take on `device`."""
    names = () if kind is Quantization.NONE else choose_layers(model, kind, dtype, device).quantised
    quantised = {id(model.get_submodule(name).weight) for name in names}
    tables = _BYTES_PER_LAYER[kind] * len(names) if names else 0
    return int(
        tables
        + sum(
            weight.numel() * (_BYTES_PER_WEIGHT[kind] if id(weight) in quantised else dtype.itemsize)
            for weight in model.parameters()
        )
    )


def describe_layers(model: PreTrainedModel, kind: Quantization) -> str:
    """Describe how many linear layers of a loaded model are quantised, and which, without the output head, are not."""
    head = model.get_output_embeddings()
    layers = [(name, module) for name, module in _linear_layers(model) if module is not head]
    left = [(name, module) for name, module in layers if not _is_quantised(module)]
    counts = f"{kind}: {len(layers) - len(left)} of {len(layers)} linear layers"
    if not left:
        return counts
    num_bytes = sum(weight.numel() * weight.element_size() for _, module in left for weight in module.parameters())
    names = ", ".join([name for name, _ in left[:_NUM_NAMES]] + ["…"] * (len(left) > _NUM_NAMES))
    return f"{counts}, {len(left)} left as they are ({num_bytes / _MEBIBYTE:.1f} MiB): {names}"


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the stored bytes of parameters and buffers, including the scales of quantised ones.

    transformers' get_memory_footprint counts int8 weights by their logical dtype and omits the scales of nf4.
    """
    stored: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sum(part.numel() * part.element_size() for tensor in stored for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):  # a wrapper subclass (torch.utils._python_dispatch)
        names, _ = tensor.__tensor_flatten__()
        yield from (getattr(tensor, name) for name in names)
        return
    yield tensor
    scales = getattr(tensor, "quant_state", None)  # of bitsandbytes, outside the parameter
    if scales is not None:
        yield from (part for part in scales.as_dict().values() if isinstance(part, Tensor))


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))


def _is_quantised(module: nn.Module) -> bool:
    weight = module.weight
    return hasattr(weight, "__tensor_flatten__") or getattr(weight, "quant_state", None) is not None


def _packs_nf4() -> bool:
    """Return whether bitsandbytes packs nf4 weights on this CPU, by the check of its own layers; not before 0.49."""
    has_avx512bf16 = getattr(import_module("bitsandbytes.nn.modules"), "has_avx512bf16", None)
    return has_avx512bf16 is not None and bool(has_avx512bf16())


def require_library(kind: Quantization) -> None:
    """Raise CannotStart when the library that quantises weights this way is not installed."""
    """Raise CannotStart when what quantises weights this way is not installed."""
    module, distribution = _PACKAGES[kind]
    if not _can_import(module):
        raise CannotStart(f"VISIONQ_QUANTIZATION={kind}: needs {distribution}; install the `quantization` extra")


def _can_import(module: str) -> bool:
    parent, _, child = module.partition(".")
    return find_spec(parent) is not None and (not child or find_spec(module) is not None)
