"""What quantised layers stand for, and how far from it they compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from torch import Tensor, nn

from tests.unit.worker.prompting.conversations import IMAGE, image, user
from worker.models.loader import LoadedModel, load
from worker.prompting.prepare import PromptBuilder
from worker.settings import Dtype, Quantization, WorkerSettings

#: Whether bitsandbytes packs nf4 weights for AVX512-BF16: never, and on a processor that has it.
PACKINGS = sorted({False, bool(has_avx512bf16())})
#: Share of a bfloat16 product that rounding may take: 8 bits of each factor.
ROUNDING = 0.01


def pack(monkeypatch: pytest.MonkeyPatch, is_packed: bool) -> None:
    """Have layers that are made from now on pack their weights or not; a processor without AVX512-BF16 cannot."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: is_packed)


def written_out(layer: nn.Module) -> Tensor | None:
    """Return the weight, rows x columns, that a quantised layer stands for; None for a layer that is whole.

    bitsandbytes packs at the first forward: ask before.
    """
    weight: Any = layer.weight
    if hasattr(weight, "__tensor_flatten__"):
        whole: Tensor = weight.dequantize()
        return whole.float()
    state = getattr(weight, "quant_state", None)
    return None if state is None else dequantize_4bit(weight.data, state).float()


def error(layer: nn.Linear, weight: Tensor, inputs: Tensor) -> float:
    """Return how far a layer's output is from that of `weight`, relative to the latter."""
    with torch.inference_mode():
        bias = None if layer.bias is None else layer.bias.float()
        expected = nn.functional.linear(inputs.float(), weight, bias)
        return float((layer(inputs).float() - expected).norm() / expected.norm())


def errors_of_a_prompt(checkpoint: Path, kind: Quantization, dtype: Dtype) -> dict[str, float]:
    """Return how far each quantised layer computes from what it stands for, by name, on the inputs of a prompt.

    The prompt has a picture.
    """
    loaded = load(WorkerSettings(model=str(checkpoint), quantization=kind, dtype=dtype))
    errors: dict[str, float] = {}
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, nn.Linear) and (weight := written_out(layer)) is not None:
            layer.register_forward_hook(_measuring(errors, name, weight))
    with torch.inference_mode():
        logits = loaded.model(**_inputs(loaded)).logits
    assert torch.isfinite(logits).all()
    return errors


def _inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # PaliGemma's processor makes labels in a way NumPy 2 warns about.
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        tensors = PromptBuilder(loaded).prepare((user(IMAGE, "What colour is it?"),), [image(1)]).tensors
    return {name: value.to(loaded.dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _measuring(errors: dict[str, float], name: str, weight: Tensor) -> Callable[..., None]:
    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        expected = nn.functional.linear(inputs[0].float(), weight, None if layer.bias is None else layer.bias.float())
        errors[name] = max(errors.get(name, 0.0), float((output.float() - expected).norm() / expected.norm()))

    return measure
