"""Quantised checkpoints load, take the memory that they promise, and answer as the whole ones do.

bitsandbytes packs nf4 weights where the processor has AVX512-BF16: what depends on it is tried both ways there.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from optimum.quanto import QLinear, qint8
from PIL import Image
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.tiny import families
from tests.tiny.families import FAMILIES, build
from tests.tiny.kinds import each_kind
from tests.tiny.quantised import PACKINGS, ROUNDING, error, errors_of_a_prompt, pack, written_out
from worker.check import check
from worker.errors import CannotStart
from worker.models.loader import LoadedModel, load
from worker.models.quantization import can_serve, choose_layers, expected_bytes, guard_inputs, weight_bytes
from worker.settings import Dtype, Quantization, WorkerSettings

KINDS = [Quantization.INT8, Quantization.NF4]
CPU = torch.device("cpu")
#: Layers as idefics2 has them.
ALIKE = ("idefics2-window", "idefics2-splitting")
#: Each kind with each way in which this processor may compute it.
WAYS = [(Quantization.INT8, False), *((Quantization.NF4, is_packed) for is_packed in PACKINGS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Rows and columns of layers: whole blocks, parts of them, odd ones, a head of one row.
SIZES = [
    (rows, columns)
    for rows in (1, 3, 8, 16, 31, 32, 33, 48, 64, 96, 288)
    for columns in (1, 3, 4, 16, 20, 32, 36, 48, 63, 64, 65, 96, 100, 128, 192, 1088)
]
#: One row, several, many, a batch of sequences, a grid of patches.
INPUTS = [(1,), (2,), (7,), (130,), (1, 1), (2, 5), (1, 2, 3)]


def quantise(whole: nn.Linear, kind: Quantization, dtype: torch.dtype) -> nn.Linear:
    """Return a layer quantised as loading does it; `dtype` is what nf4 computes in."""
    if kind is Quantization.INT8:
        layer = QLinear.from_module(whole, weights=qint8)
        layer.freeze()
        return layer.eval()
    layer = Linear4bit(whole.in_features, whole.out_features, whole.bias is not None, dtype, quant_type="nf4")
    layer.weight = Params4bit(whole.weight.data, quant_type="nf4", module=layer)
    layer.bias = whole.bias
    return layer.to("cpu").eval()


def empty(checkpoint: Path) -> PreTrainedModel:
    """Return a checkpoint's model without its weights."""
    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights():
        model = getattr(transformers, config.architectures[0])(config)
    model.tie_weights()
    return model


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
    foreseen = expected_bytes(empty, kind, torch.float32, CPU)
    assert foreseen == pytest.approx(weight_bytes(loaded.model), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_answers_from_quantised_weights(kind: Quantization) -> None:
    report = check(WorkerSettings(quantization=kind))
    assert "square" in report.split("answer", 1)[1]


@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
@pytest.mark.parametrize("name", ["llava"])
def test_a_family_starts_from_quantised_weights_in_the_type_that_is_usual_on_a_processor(
    name: str,
    kind: Quantization,
    is_packed: bool,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack(monkeypatch, is_packed)
    report = check(WorkerSettings(model=str(tiny_checkpoint(name)), quantization=kind, dtype=Dtype.FLOAT32))
    assert f"{kind}: " in report


@pytest.mark.parametrize(("kind", "tolerance"), [(KINDS[0], 0.02), (KINDS[1], 0.3)])
def test_quantised_weights_say_nearly_the_same(kind: Quantization, tolerance: float) -> None:
    image = Image.new("RGB", (64, 64), "white")
    expected, got = logits(demo(Quantization.NONE), image), logits(demo(kind), image)
    assert expected.argmax() == got.argmax()
    divergence = torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum")
    assert divergence < tolerance


@pytest.mark.parametrize("dtype", each_kind([Dtype.FLOAT32, Dtype.BFLOAT16], always=[Dtype.FLOAT32]))
@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
@pytest.mark.parametrize("name", each_kind(name for name in FAMILIES if name not in ALIKE))
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
def test_a_layer_of_any_size_that_is_quantised_computes_what_its_weight_stands_for(
    kind: Quantization, is_packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(monkeypatch, is_packed)
    torch.manual_seed(0)
    served = [
        (rows, columns)
        for rows, columns in SIZES
        if can_serve(kind, columns, rows, device="cpu", dtype=dtype, packs_nf4=is_packed)
    ]
    assert len(served) >= 15
    for rows, columns in served:
        for has_bias in (True, False):
            layer = quantise(nn.Linear(columns, rows, has_bias, dtype=dtype), kind, dtype)
            weight = written_out(layer)
            assert weight is not None
            for leading in INPUTS:
                inputs = torch.randn(*leading, columns).to(dtype)
                assert error(layer, weight, inputs) < 4 * ROUNDING, (rows, columns, has_bias, leading)


@pytest.mark.parametrize("is_packed", [is_packed for is_packed in PACKINGS if is_packed])
def test_no_size_that_nf4_could_compute_packed_is_left_out(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(monkeypatch, is_packed)
    for rows, columns in SIZES:
        if not can_serve(Quantization.NF4, columns, rows, device="cpu", dtype=torch.float32, packs_nf4=is_packed):
            layer = quantise(nn.Linear(columns, rows), Quantization.NF4, torch.float32)
            with pytest.raises((AssertionError, RuntimeError)), torch.inference_mode():
                layer(torch.randn(2, columns))


@pytest.mark.parametrize("columns", [4, 20, 100])
def test_int8_in_bfloat16_leaves_out_what_reads_past_its_weights(columns: int) -> None:
    """In a child: where the kernel has vector units, reading past the end of the last row kills the process."""
    assert not can_serve(Quantization.INT8, columns, 8, device="cpu", dtype=torch.bfloat16, packs_nf4=False)
    program = (
        "import torch; torch.manual_seed(0)\n"
        f"weight = torch.randint(-9, 9, (8, {columns}), dtype=torch.int8)\n"
        f"x, scale = torch.randn(130, {columns}).bfloat16(), torch.ones(8).bfloat16()\n"
        "far = torch._weight_int8pack_mm(x, weight, scale).float() - x.float() @ weight.float().t()\n"
        "raise SystemExit(not (far.abs().max() > 1))\n"
    )
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode <= 0


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "dtype", "is_packed", "is_served"),
    [
        (Quantization.NF4, 32, 64, torch.float32, True, True),
        (Quantization.NF4, 96, 128, torch.bfloat16, True, True),
        (Quantization.NF4, 32, 32, torch.float32, True, False),
        (Quantization.NF4, 32, 96, torch.float32, True, False),
        (Quantization.NF4, 48, 64, torch.bfloat16, True, False),
        (Quantization.NF4, 4304, 1152, torch.bfloat16, True, False),
        (Quantization.NF4, 1152, 4304, torch.bfloat16, True, False),
        (Quantization.NF4, 32, 32, torch.float32, False, True),
        (Quantization.NF4, 7, 33, torch.float32, False, True),
        (Quantization.INT8, 7, 48, torch.bfloat16, False, True),
        (Quantization.INT8, 7, 33, torch.bfloat16, False, True),
        (Quantization.INT8, 64, 36, torch.bfloat16, False, False),
        (Quantization.INT8, 64, 36, torch.float16, False, True),
        (Quantization.INT8, 64, 36, torch.float32, True, True),
    ],
)
def test_what_a_cpu_can_compute_follows_from_size_and_type(
    kind: Quantization, rows: int, columns: int, dtype: torch.dtype, is_packed: bool, is_served: bool
) -> None:
    def served_on(device: str) -> bool:
        return can_serve(kind, columns, rows, device=device, dtype=dtype, packs_nf4=is_packed)

    assert served_on("cpu") is is_served
    assert served_on("cuda"), "CUDA dequantises what its fused kernels do not take"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
def test_an_input_that_does_not_lie_densely_changes_nothing(
    kind: Quantization, is_packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches come out of a convolution channels first: a transposed view, which the packed kernel read as it lies."""
    pack(monkeypatch, is_packed)
    torch.manual_seed(0)
    layer = quantise(nn.Linear(128, 96, dtype=dtype), kind, dtype)
    weight = written_out(layer)
    assert weight is not None
    guard_inputs(nn.Sequential(layer))
    wide = torch.randn(1, 128, 4, 6).to(dtype)
    views = [
        wide.flatten(2).transpose(1, 2),
        wide.permute(0, 2, 3, 1),
        wide[0, :, 0].t(),
        torch.randn(24, 256).to(dtype)[:, ::2],
        torch.randn(24, 256).to(dtype)[:, 128:],
        torch.randn(1, 1, 128).to(dtype).expand(2, 24, 128),
    ]
    for view in views:
        assert error(layer, weight, view) < ROUNDING, (view.shape, view.stride())


def test_an_input_cast_to_the_type_of_a_quantised_weight_is_refused() -> None:
    layer = quantise(nn.Linear(64, 32), Quantization.NF4, torch.float32)
    guard_inputs(nn.ModuleDict({"patches": layer}))
    with pytest.raises(TypeError, match="hands its quantised layer patches uint8"):
        layer(torch.rand(2, 64).to(layer.weight.dtype))


@pytest.mark.parametrize(("kind", "is_packed"), WAYS)
def test_layers_that_cannot_be_quantised_are_left_logged_and_counted(
    kind: Quantization,
    is_packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack(monkeypatch, is_packed)
    monkeypatch.setitem(families.VISION, "intermediate_size", 36)
    settings = WorkerSettings(model=str(build("idefics2", tmp_path)), quantization=kind, dtype=Dtype.BFLOAT16)
    caplog.set_level(logging.WARNING, "worker")

    model = load(settings).model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers.pop("lm_head")
    left = [
        name
        for name, module in layers.items()
        if not can_serve(
            kind, module.in_features, module.out_features, device="cpu", dtype=torch.bfloat16, packs_nf4=is_packed
        )
    ]
    assert [name for name, module in layers.items() if type(module) is nn.Linear] == left
    logged = [vars(record)["layers"] for record in caplog.records if "layers" in vars(record)]
    assert logged == ([left] if left else [])

    row = next(line for line in check(settings).splitlines() if line.startswith("quantised"))
    told = f"{kind}: {len(layers) - len(left)} of {len(layers)} linear layers"
    assert told in row
    if left:
        num_bytes = sum(weight.numel() * 2 for name in left for weight in layers[name].parameters())
        mebibytes = f"{num_bytes / 1024**2:.1f}"
        assert f"{told}, {len(left)} left as they are ({mebibytes} MiB): {', '.join(left[:3])}" in row
    assert bool(left) == (is_packed or kind is Quantization.INT8)
    foreseen = expected_bytes(empty(tmp_path), kind, torch.bfloat16, CPU)
    assert foreseen == pytest.approx(weight_bytes(load(settings).model), rel=0.04)


def test_a_name_left_alone_leaves_no_other_layer_that_ends_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pack(monkeypatch, True)
    with init_empty_weights():
        model = type(demo(Quantization.NONE).model)(demo(Quantization.NONE).model.config)
        model.proj = nn.Linear(32, 8)
    choice = choose_layers(model, Quantization.NF4, torch.float32, CPU)
    assert choice.unserved == ("proj",)
    assert any(name.endswith("q_proj") for name in choice.quantised)
    assert not should_convert_module("proj", choice.skipped)
    assert all(should_convert_module(name, choice.skipped) for name in choice.quantised)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_others_read_is_left_whole(kind: Quantization) -> None:
    """nn.MultiheadAttention hands its projection's weight to a function of its own."""
    with init_empty_weights():
        model = type(demo(Quantization.NONE).model)(demo(Quantization.NONE).model.config)
        model.pool = nn.MultiheadAttention(64, 4)
    choice = choose_layers(model, kind, torch.float32, CPU)
    assert choice.unserved == ("pool.out_proj",)


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
