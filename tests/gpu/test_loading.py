"""Loading onto GPUs: half precision, fewer bits, and several GPUs for one model."""

from __future__ import annotations

import pytest
import torch

from worker.check import check
from worker.models.loader import load
from worker.models.quantization import weight_bytes
from worker.settings import Quantization, WorkerSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_weights_are_bfloat16_on_the_gpu() -> None:
    loaded = load(WorkerSettings())
    assert loaded.dtype is torch.bfloat16
    assert {weight.device.type for weight in loaded.model.parameters()} == {"cuda"}


@pytest.mark.parametrize(("kind", "largest"), [(Quantization.INT8, 0.62), (Quantization.NF4, 0.42)])
def test_quantised_weights_take_less_of_the_gpu_and_answer(kind: Quantization, largest: float) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    whole = load(WorkerSettings())
    taken = torch.cuda.memory_allocated() - before
    quantised = load(WorkerSettings(quantization=kind))
    assert torch.cuda.memory_allocated() - before - taken < largest * taken
    assert weight_bytes(quantised.model) < largest * weight_bytes(whole.model)
    assert "square" in check(WorkerSettings(quantization=kind)).split("answer", 1)[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", list(Quantization))
def test_a_model_over_two_gpus_answers_as_on_one(kind: Quantization) -> None:
    one, two = WorkerSettings(quantization=kind, device="cuda:0"), WorkerSettings(quantization=kind, device="balanced")
    devices = {weight.device for weight in load(two).model.parameters()}
    assert len(devices) > 1
    assert check(two).split("answer", 1)[1] == check(one).split("answer", 1)[1]
