"""Quantised checkpoints load, take the memory that they promise, and answer as the whole ones do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from tests.tiny.families import picture
from worker.check import check
from worker.errors import CannotStart
from worker.models.loader import LoadedModel, load
from worker.models.quantization import expected_bytes, weight_bytes
from worker.settings import Dtype, Quantization, WorkerSettings

KINDS = [Quantization.INT8, Quantization.NF4]


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Shapes of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


@cache
def demo(kind: Quantization) -> LoadedModel:
    """The shipped checkpoint, loaded once per kind; nobody changes it."""
    return load(WorkerSettings(quantization=kind))


def logits(loaded: LoadedModel, image: Image.Image) -> torch.Tensor:
    """Log-probabilities of the demo's first token about a picture."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
    text = loaded.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = loaded.processor(text=text, images=[image], return_tensors="pt")
    with torch.inference_mode():
        return loaded.model(**inputs).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised(kind: Quantization) -> None:
    whole, quantised = demo(Quantization.NONE).model, demo(kind).model
    bytes_per_weight = {Quantization.INT8: 1, Quantization.NF4: 0.5}[kind]
    weights = dict(quantised.named_parameters())
    shapes = linear_shapes(whole)
    assert len(shapes) > 40
    for name, (rows, columns) in shapes.items():
        weight = weights[f"{name}.weight"]
        stored = weight._data if kind is Quantization.INT8 else weight
        assert stored.dtype is (torch.int8 if kind is Quantization.INT8 else torch.uint8), name
        assert stored.numel() * stored.element_size() == rows * columns * bytes_per_weight, name
    assert type(quantised.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(("kind", "smallest", "largest"), [(KINDS[0], 0.25, 0.32), (KINDS[1], 0.125, 0.22)])
def test_memory_is_what_is_stored(kind: Quantization, smallest: float, largest: float) -> None:
    whole = demo(Quantization.NONE).model
    assert weight_bytes(whole) == whole.get_memory_footprint()
    assert smallest < weight_bytes(demo(kind).model) / weight_bytes(whole) < largest


@pytest.mark.parametrize("kind", list(Quantization))
def test_memory_is_foreseen(kind: Quantization) -> None:
    loaded = demo(kind)
    with init_empty_weights():
        empty = type(demo(Quantization.NONE).model)(loaded.model.config)
    empty.tie_weights()
    foreseen = expected_bytes(empty, kind, torch.float32)
    assert foreseen == pytest.approx(weight_bytes(loaded.model), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_answers_from_quantised_weights(kind: Quantization) -> None:
    report = check(WorkerSettings(quantization=kind))
    assert "square" in report.split("answer", 1)[1]


@pytest.mark.parametrize(("kind", "tolerance"), [(KINDS[0], 0.02), (KINDS[1], 0.3)])
def test_quantised_weights_say_nearly_the_same(kind: Quantization, tolerance: float) -> None:
    image = Image.new("RGB", (64, 64), "white")
    expected, got = logits(demo(Quantization.NONE), image), logits(demo(kind), image)
    assert expected.argmax() == got.argmax()
    divergence = torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum")
    assert divergence < tolerance


@pytest.mark.parametrize("name", ["llava", "idefics2"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_families_are_quantised_too(
    kind: Quantization, name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    whole = load(WorkerSettings(model=str(tiny_checkpoint(name))))
    quantised = load(WorkerSettings(model=str(tiny_checkpoint(name)), quantization=kind))
    assert weight_bytes(quantised.model) < 0.8 * weight_bytes(whole.model)
    inputs = whole.processor(text="<image>What?", images=[picture(1)], return_tensors="pt")
    with torch.inference_mode():
        assert torch.isfinite(quantised.model(**inputs).logits).all()


def test_nf4_computes_in_the_named_half_precision() -> None:
    loaded = load(WorkerSettings(quantization=Quantization.NF4, dtype=Dtype.BFLOAT16))
    layer = loaded.model.model.text_model.layers[0].self_attn.q_proj
    assert layer.compute_dtype is torch.bfloat16
    assert layer.weight.quant_state.nested, "the scales are not quantised again"


@pytest.mark.parametrize(
    ("kind", "package"), [(Quantization.INT8, "optimum-quanto"), (Quantization.NF4, "bitsandbytes")]
)
def test_quantisation_without_its_library_is_refused(
    kind: Quantization, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.models.quantization.find_spec", lambda name: None)
    with pytest.raises(CannotStart) as refused:
        load(WorkerSettings(quantization=kind))
    assert str(refused.value) == f"VISIONQ_QUANTIZATION={kind}: needs {package}; install the `quantization` extra"
