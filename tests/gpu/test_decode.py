"""Decode steps on a GPU: kernels, recorded steps, running ahead. Logits beside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import Outbox, request
from worker.bench.engine import copy_bandwidth
from worker.engine.attention.choose import choose_kernels
from worker.engine.attention.kernels import SDPA
from worker.engine.batch import Chunk
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.kv_cache.blocks import LayerShape
from worker.engine.request import Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import PagedRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORCED = [17, 23, 99, 54, 17, 61, 5, 80, 12, 33, 47, 21]
#: How far bfloat16 logits may lie apart, as a share of the largest; float32 ones on a GPU, with TF32 off.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}


@pytest.fixture(params=["idefics2-window", "llava", "gemma3"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def on_gpu(name: str, directory: Path, dtype: torch.dtype) -> TinyModel:
    tiny = TinyModel(name, directory)
    tiny.model.to("cuda", dtype)  # type: ignore[arg-type]
    return tiny


def runner_of(tiny: TinyModel, **config: bool) -> PagedRunner:
    runner = build_runner(tiny.model, 4, 256, PagedConfig(block_size=16, **config))  # type: ignore[arg-type]
    assert isinstance(runner, PagedRunner)
    return runner


def forced_logits(runner: PagedRunner, requests: list[Request]) -> list[Tensor]:
    """Feed the same tokens to all, whatever the model says; return each request's logits, [1 + len(FORCED), V]."""
    made: dict[Request, list[Tensor]] = {each: [] for each in requests}
    for each in requests:
        runner.allocate(each)
    for token in [*FORCED, 0]:
        assert all(runner.append(each) for each in requests)
        step = runner.run([Chunk(each, each.num_unread) for each in requests])
        assert step.logits is not None
        for each, row in zip(step.requests, step.logits.clone(), strict=True):
            made[each].append(row.float())
            each.output_ids.append(token)
    for each in requests:
        runner.free(each)
    return [torch.stack(rows) for rows in made.values()]


def requests_of(tiny: TinyModel) -> list[Request]:
    prompts = [tiny.inputs("What is it?"), tiny.inputs("And this?", [picture(1)]), tiny.inputs("Two", [picture(2)] * 2)]
    return [Request(request(inputs, max_new_tokens=40), submitted_at=0.0) for inputs in prompts]


def models_own_logits(tiny: TinyModel, each: Request) -> Tensor:
    """Return the logits of prompt and forced tokens in one forward."""
    inputs = {key: value.to("cuda") for key, value in each.inputs.tensors.items()}
    forced = torch.tensor([FORCED], device="cuda")
    inputs["input_ids"] = torch.cat((inputs["input_ids"], forced), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.cat((inputs["token_type_ids"], torch.zeros_like(forced)), dim=1)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(tiny.model.dtype)
    logits: Tensor = tiny.model(**inputs).logits[0, -len(FORCED) - 1 :]
    return logits.float()


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_forced_tokens_have_the_models_own_logits(
    tiny_checkpoint: Callable[[str], Path], name: str, dtype: torch.dtype
) -> None:
    tiny = on_gpu(name, tiny_checkpoint(name), dtype)
    requests = requests_of(tiny)
    for each, got in zip(requests, forced_logits(runner_of(tiny), requests), strict=True):
        assert close(got, models_own_logits(tiny, each), dtype)


@torch.inference_mode()
def test_recorded_steps_and_kernels_give_the_logits_of_plain_ones(
    tiny_checkpoint: Callable[[str], Path], name: str
) -> None:
    tiny = on_gpu(name, tiny_checkpoint(name), torch.float32)
    recorded = runner_of(tiny, records=True)
    assert recorded._graphs is not None
    plain = runner_of(tiny, records=False, tries_kernels=False)
    assert plain._graphs is None
    got, expected = forced_logits(recorded, requests_of(tiny)), forced_logits(plain, requests_of(tiny))
    assert all(close(one, other, torch.float32) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_kernel_is_found_for_decode_steps_and_for_pieces(dtype: torch.dtype) -> None:
    """Head dims of Mistral and Gemma; Triton comes with torch's CUDA build."""
    assert find_spec("triton") is not None
    for num_kv_heads, dim in ((8, 128), (4, 256), (8, 80)):
        shape = LayerShape(num_kv_heads, dim, dim, dtype, torch.device("cuda", 0))
        kernels = choose_kernels({0: shape}, 4 * num_kv_heads, block_size=16)
        assert kernels.decode is not SDPA.decode
        assert kernels.prefill is not SDPA.prefill


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Let CUDA calls that wait for the device raise; waiting for an event is not one of them."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.5}], ids=str)
def test_a_decode_step_never_waits_for_the_device(
    tiny_checkpoint: Callable[[str], Path], records: bool, sampling: dict[str, float]
) -> None:
    """From scheduling to the text; a batch that has just got smaller is rebuilt without waiting too."""
    tiny = on_gpu("idefics2", tiny_checkpoint("idefics2"), torch.bfloat16)
    core = EngineCore(
        tiny.model, tiny.tokenizer, runner_of(tiny, records=records), SchedulerLimits(4, 512), runs_ahead=True
    )
    for number in range(3):
        inputs = tiny.inputs(f"number {number}", [picture(number)])
        core.add(request(inputs, max_new_tokens=8 + 8 * number, **sampling), submitted_at=0.0)
    for _ in range(4):
        core.step()
    with refusing_to_wait():
        for _ in range(12):
            core.step()
    assert core.scheduler.num_running == 2


@torch.inference_mode()
def test_running_ahead_and_replaying_leave_no_block_behind(tiny_checkpoint: Callable[[str], Path]) -> None:
    tiny = on_gpu("idefics2", tiny_checkpoint("idefics2"), torch.bfloat16)
    runner = runner_of(tiny, records=True)
    num_free = runner.num_free_blocks
    core = EngineCore(tiny.model, tiny.tokenizer, runner, SchedulerLimits(4, 64), runs_ahead=True)
    outbox = Outbox()
    jobs = [request(tiny.inputs(f"number {n}", [picture(n)]), max_new_tokens=1 + 3 * n) for n in range(12)]
    for each in jobs:
        core.add(each, submitted_at=0.0)
    while not core.scheduler.is_idle:
        for output in core.step():
            outbox.outputs[output.request_id].append(output)
    for number, each in enumerate(jobs):
        assert 1 <= outbox.finish(each.request_id).num_completion_tokens <= 1 + 3 * number
    assert runner.num_free_blocks == num_free


def test_the_floor_is_that_of_device_memory() -> None:
    """An H200's data sheet says 4.8 TB/s; any GPU that the engine is for copies faster than a CPU."""
    assert 2e11 < copy_bandwidth(torch.device("cuda")) < 1e13
