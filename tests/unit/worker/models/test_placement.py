"""Weights go to one device when they fit it, over several GPUs when they do not, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations.accelerate import infer_auto_device_map

from worker.errors import CannotStart
from worker.models.loader import load
from worker.models.placement import GIBIBYTE, Placement, place
from worker.models.quantization import expected_bytes
from worker.settings import Quantization, WorkerSettings

ONE = {0: 80 * GIBIBYTE}
FOUR = dict.fromkeys(range(4), 80 * GIBIBYTE)
GPU_0 = Placement(torch.device("cuda:0"), {"device_map": {"": torch.device("cuda:0")}})


def unasked() -> int:
    """Building an empty model takes seconds; nobody may ask for its size in vain."""
    pytest.fail("the size was asked for")


def gibibytes(number: float) -> Callable[[], int]:
    return lambda: int(number * GIBIBYTE)


def refusal(value: str, free_bytes: dict[int, int], num_bytes: Callable[[], int]) -> str:
    with pytest.raises(CannotStart) as refused:
        place(value, free_bytes, num_bytes)
    return str(refused.value)


def test_without_a_gpu_everything_is_on_the_cpu() -> None:
    assert place("auto", {}, unasked) == place("cpu", {}, unasked) == Placement(torch.device("cpu"))
    assert place("cpu", FOUR, unasked) == Placement(torch.device("cpu"))


def test_one_gpu_is_taken_whatever_the_size() -> None:
    assert place("auto", ONE, unasked).options == {"device_map": {"": torch.device("cuda")}}
    assert place("cuda:2", FOUR, unasked) == Placement(
        torch.device("cuda:2"), {"device_map": {"": torch.device("cuda:2")}}
    )


def test_several_gpus_are_taken_only_by_weights_that_need_them() -> None:
    assert place("auto", FOUR, gibibytes(63.9)) == GPU_0
    spread = place("auto", FOUR, gibibytes(64.1))
    assert spread.device == torch.device("cuda:0")
    assert spread.options == {"device_map": "balanced", "max_memory": dict.fromkeys(range(4), 64 * GIBIBYTE)}
    assert place("balanced", FOUR, gibibytes(1)) == spread


def test_what_is_not_there_or_does_not_fit_is_refused() -> None:
    assert refusal("balanced", ONE, unasked_one).startswith("VISIONQ_DEVICE=balanced: needs several CUDA devices")
    assert refusal("balanced", {}, unasked_one).endswith("torch sees 0")
    assert refusal("cuda:4", FOUR, unasked) == "VISIONQ_DEVICE=cuda:4: no such CUDA device; torch sees 4"
    message = refusal("auto", FOUR, gibibytes(257))
    assert message.startswith("VISIONQ_DEVICE=auto: weights of 257.0 GiB do not fit 4 GPUs, which have 256.0 GiB")
    assert "VISIONQ_QUANTIZATION" in message


def unasked_one() -> int:
    return 1


@pytest.mark.parametrize("name", ["idefics2", "llava", "gemma3"])
def test_accelerate_parts_a_model_between_layers_and_leaves_nothing_over(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint(name))
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    half = expected_bytes(model, Quantization.NONE, torch.float32, torch.device("cuda")) * 3 // 5
    devices = infer_auto_device_map(
        model, max_memory={0: half, 1: half * 2}, no_split_module_classes=model._no_split_modules
    )
    assert set(devices.values()) == {0, 1}
    decoder = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    layers = len(decoder.layers)
    for number in range(layers):
        place_of = [key for key in devices if f"{prefix}.layers.{number}".startswith(key)]
        assert len(place_of) == 1, f"layer {number} is split"


@pytest.mark.parametrize(("num_bytes", "left_over"), [(60_000, "everything"), (400_000, "model.vision_tower")])
def test_a_model_that_accelerate_leaves_on_a_disk_is_refused(
    num_bytes: int, left_over: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_small = Placement(torch.device("cpu"), {"device_map": "balanced", "max_memory": {"cpu": num_bytes}})
    monkeypatch.setattr("worker.models.loader.place", lambda *_: too_small)
    with pytest.raises(CannotStart, match=f"VISIONQ_DEVICE=auto: the GPUs are too small; left over: {left_over}"):
        load(WorkerSettings(model=str(tiny_checkpoint("llava"))))
