"""The paged back end: its budget, its load-time trial, and what its decode step may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import request, running_engine
from worker.engine.attention.paged import attending
from worker.engine.batch import DecodeInputs
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.kv_cache.blocks import PagedKV
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.runner.build import Unsuited, build_runner, probe
from worker.engine.runner.paged import FlatForward, PagedRunner
from worker.errors import CannotStart
from worker.models.inputs import ModelInputs

PAGED_FAMILIES = ["idefics2-window", "llava", "idefics3", "gemma3", "paligemma", "blip2"]


def paged_runner(tiny: TinyModel, max_num_seqs: int = 4, max_model_len: int = 256) -> PagedRunner:
    runner = build_runner(tiny.model, max_num_seqs, max_model_len, PagedConfig(block_size=4))
    assert isinstance(runner, PagedRunner)
    return runner


@contextmanager
def fed_tokens(tiny: TinyModel) -> Iterator[list[int]]:
    """Yield a list that gets the number of tokens of every forward of the text model."""
    sizes: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["inputs_embeds"].shape[1])

    hook = tiny.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


@torch.inference_mode()
def test_a_prompt_of_6000_tokens_never_exceeds_the_budget_and_stalls_nobody(idefics2: TinyModel) -> None:
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=256)
    core = EngineCore(idefics2.model, idefics2.tokenizer, paged_runner(idefics2, 4, 6100), limits)
    streams = [request(idefics2.inputs(f"stream {number}"), max_new_tokens=60) for number in range(3)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (1, 6000), generator=generator)
    long = request(ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), max_new_tokens=2)
    for each in streams:
        core.add(each, submitted_at=0.0)
    for _ in range(5):
        core.step()
    core.add(long, submitted_at=0.0)
    running = core.scheduler.running[:3]
    with fed_tokens(idefics2) as sizes:
        before = [len(each.output_ids) for each in running]
        num_steps = 0
        while (reader := core.scheduler.find(long.request_id)) is None or not reader.output_ids:
            core.step()
            num_steps += 1
        assert [len(each.output_ids) for each in running] == [count + num_steps for count in before]
    # The capture of the prompt reaches the decoder's door too, and stops there.
    flat_steps = [size for size in sizes if size != 6000]
    assert len(flat_steps) == num_steps == -(-6000 // (256 - 3))
    assert max(flat_steps) == 256
    assert [int(token) for token in reader.output_ids] == idefics2.generate(long.inputs, 1)


#: Operators that need a number on the host, or as many results as a mask has bits.
WAITING = {
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::where", "aten::index(mask)",
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Notes the operators that run, indexing by a mask apart from indexing by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_mask = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.names.add("aten::index(mask)" if is_mask else func.name())
        return func(*args, **(kwargs or {}))


def decode_inputs_of(runner: PagedRunner, tiny: TinyModel) -> DecodeInputs:
    """Read two prompts and return what their first decode step is given."""
    core = EngineCore(tiny.model, tiny.tokenizer, runner, SchedulerLimits(4, 512))
    for number in range(2):
        core.add(request(tiny.inputs(f"number {number}" * (number + 1), [picture(number)]), 20), submitted_at=0.0)
    core.step()
    core.scheduler.schedule()
    return runner._decode_inputs(core.scheduler.running)


@torch.inference_mode()
@pytest.mark.parametrize("name", PAGED_FAMILIES)
def test_a_decode_step_never_waits_for_the_device(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    tiny = tiny_model(name)
    runner = paged_runner(tiny)
    inputs = decode_inputs_of(runner, tiny)
    with Trace() as trace:
        runner._forward.decode(inputs)
    assert "aten::scaled_dot_product_attention" in trace.names
    assert not trace.names & WAITING
    with Trace() as trace:
        int(inputs.ids.sum())
        inputs.ids[inputs.ids > 0]
    assert trace.names >= {"aten::item", "aten::index(mask)"}, "the trace sees what it is there to see"


@torch.inference_mode()
@pytest.mark.parametrize("name", ["idefics2", "gemma3"])
def test_padding_rows_change_nothing(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    tiny = tiny_model(name)
    runner = paged_runner(tiny)
    inputs = decode_inputs_of(runner, tiny)
    alone = runner._forward.decode(inputs)

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(3, *tensor.shape[1:])))

    wide = torch.nn.functional.pad(padded(inputs.block_table), (0, 4))
    filled = DecodeInputs(padded(inputs.ids), padded(inputs.positions), padded(inputs.num_cached), wide)
    together = runner._forward.decode(filled)
    assert together.shape[0] == 5
    torch.testing.assert_close(together[:2], alone, atol=1e-5, rtol=1e-5)


def test_an_engine_on_blocks_serves_and_cancels(idefics2: TinyModel) -> None:
    with running_engine(idefics2, max_num_seqs=3, paged=PagedConfig(block_size=8)) as (engine, outbox):
        assert (engine.kv_backend, engine.why_not_paged) == ("paged", None)
        requests = [request(idefics2.inputs(f"number {n}", [picture(n)]), max_new_tokens=20) for n in range(6)]
        for each in requests:
            engine.submit(each)
        engine.cancel(requests[1].request_id)
        for each in requests:
            outbox.finish(each.request_id)
    for each in [requests[0], *requests[2:]]:
        expected = idefics2.generate(each.inputs, 20)
        assert outbox.text(each.request_id) == idefics2.tokenizer.decode(expected, skip_special_tokens=True).lstrip()


@torch.inference_mode()
def test_two_engines_in_one_process_do_not_disturb_each_other(tiny_model: Callable[[str], TinyModel]) -> None:
    """Step by step in turns, and `generate` of the same models in between."""
    tinies = [tiny_model("idefics2"), tiny_model("gemma3")]
    requests = [request(tiny.inputs("What is it?", [picture(4)]), max_new_tokens=12) for tiny in tinies]
    cores = [EngineCore(t.model, t.tokenizer, paged_runner(t), SchedulerLimits(4, 16)) for t in tinies]
    states: list[Request | None] = []
    for core, each in zip(cores, requests, strict=True):
        core.add(each, submitted_at=0.0)
        states.append(core.scheduler.find(each.request_id))
    while any(not core.scheduler.is_idle for core in cores):
        for core in cores:
            core.step()
    for tiny, each, state in zip(tinies, requests, states, strict=True):
        assert state is not None
        assert state.output_ids == tiny.generate(each.inputs, 12)


def biased_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    output, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output * 1.5, weights


@torch.inference_mode()
def test_a_model_that_attends_in_its_own_way_is_found_out(idefics2: TinyModel) -> None:
    """By paged blocks and by rows, which both attend in the usual way."""
    AttentionInterface.register("biased", biased_attention)
    config = idefics2.model.config.text_config
    assert probe(ModelHooks(idefics2.model)).keys() == {0, 1, 2}
    config._attn_implementation_internal = "biased"
    try:
        with pytest.raises(CannotStart, match="paged blocks: logits of token 1 differ"):
            build_runner(idefics2.model, 2, 64, PagedConfig())
    finally:
        config._attn_implementation_internal = "sdpa"


@torch.inference_mode()
def test_layers_of_an_unknown_type_and_models_of_another_attention_go_to_rows(
    tiny_model: Callable[[str], TinyModel], caplog: pytest.LogCaptureFixture
) -> None:
    gemma3 = tiny_model("gemma3")
    config = gemma3.model.config.text_config
    before = config.layer_types
    config.layer_types = ["sliding_attention", "chunked_attention", "full_attention"]
    try:
        with pytest.raises(Unsuited, match="chunked_attention"):
            probe(ModelHooks(gemma3.model))
    finally:
        config.layer_types = before
    runner = build_runner(tiny_model("git").model, 2, 64, PagedConfig())
    reason = "0 of 3 layers call the attention function"
    assert (runner.kv_backend, runner.why_not_paged) == ("slots", reason)
    assert [record.reason for record in caplog.records] == [reason]  # type: ignore[attr-defined]


def test_blocks_that_do_not_hold_one_full_request_are_refused(idefics2: TinyModel) -> None:
    with pytest.raises(CannotStart, match=r"2048 tokens takes 128 blocks .* room for 128"):
        build_runner(idefics2.model, 2, 2048, PagedConfig(block_size=16, num_blocks=128))
    build_runner(idefics2.model, 2, 2048, PagedConfig(block_size=16, num_blocks=129))


def test_a_prompt_that_cannot_be_read_gives_its_blocks_back(idefics2: TinyModel) -> None:
    runner = paged_runner(idefics2)
    num_free = runner.num_free_blocks
    core = EngineCore(idefics2.model, idefics2.tokenizer, runner, SchedulerLimits(4, 64))
    inputs = idefics2.inputs("two images", [picture(1), picture(2)])
    broken = ModelInputs({**inputs.tensors, "pixel_values": inputs.tensors["pixel_values"][:, :1]})
    with torch.inference_mode():
        core.add(request(broken), submitted_at=0.0)
        core.add(request(inputs, max_new_tokens=3), submitted_at=0.0)
        outputs = [output for _ in range(8) for output in core.step()]
    assert [output.finish.reason for output in outputs if output.finish] == ["failed", "length"]
    assert runner.num_free_blocks == num_free


@torch.inference_mode()
def test_a_whole_forward_needs_the_step_handed_down(idefics2: TinyModel) -> None:
    """Outside of the engine the registered function refuses, instead of computing something."""
    hooks = ModelHooks(idefics2.model)
    kv = PagedKV(probe(hooks), 2, 4)
    assert FlatForward(hooks, kv).num_axes == 1
    with attending(hooks.text_config, "visionq_flat"), pytest.raises(TypeError, match="kv_step"):
        idefics2.model(input_ids=torch.tensor([[1, 2]]))
