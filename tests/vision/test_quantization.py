"""Fewer bits in the families that need torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.quantised import PACKINGS, ROUNDING, errors_of_a_prompt, pack
from tests.tiny.torchvision_families import VIDEO_FAMILIES
from worker.settings import Dtype, Quantization

WAYS = [(Quantization.INT8, False), *((Quantization.NF4, is_packed) for is_packed in PACKINGS)]


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
@pytest.mark.parametrize("name", ["smolvlm", *VIDEO_FAMILIES])
def test_every_quantised_layer_of_every_family_computes_what_its_weights_stand_for(
    name: str,
    kind: Quantization,
    is_packed: bool,
    dtype: Dtype,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack(monkeypatch, is_packed)
    errors = errors_of_a_prompt(tiny_checkpoint(name), kind, dtype)
    assert len(errors) >= 15
    assert {name: error for name, error in errors.items() if not error < ROUNDING} == {}
