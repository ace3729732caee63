"""Recorded decode steps: padded, copied to where the recording reads, replayed; the logits are a plain step's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel
from tests.unit.worker.engine.harness import Outbox, request
from tests.unit.worker.engine.recorder import TapeRecorder
from tests.unit.worker.engine.test_positions import model_of
from worker.engine.batch import DecodeInputs
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.kv_cache.blocks import PagedKV
from worker.engine.model_hooks import ModelHooks
from worker.engine.runner.build import build_runner, probe
from worker.engine.runner.cuda_graphs import DecodeGraphs, graph_sizes
from worker.engine.runner.paged import FlatForward, PagedRunner

BLOCK_SIZE, NUM_BLOCKS, WIDTH = 4, 60, 9


def forward_of(model: object) -> FlatForward:
    """Return the flat forward of a model on a cache full of noise, null block and unowned blocks included."""
    hooks = ModelHooks(model)  # type: ignore[arg-type]
    layout = probe(hooks)
    kv = PagedKV(layout, NUM_BLOCKS, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    slot_mapping = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    for layer, shape in layout.items():
        keys = torch.randn(len(slot_mapping), shape.num_heads, shape.key_dim, generator=generator)
        values = torch.randn(len(slot_mapping), shape.num_heads, shape.value_dim, generator=generator)
        kv.write(layer, keys, values, slot_mapping)
    return FlatForward(hooks, kv)


def random_inputs(chance: random.Random, num_rows: int, longest: int = 20) -> DecodeInputs:
    """Return rows of random lengths; no two of them write to the same block."""
    lengths = [longest - 1, *(chance.randrange(1, longest) for _ in range(num_rows - 1))]
    width = max(lengths) // BLOCK_SIZE + 1
    blocks = chance.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    table = torch.zeros(num_rows, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        for place in range(length // BLOCK_SIZE + 1):
            table[row, place] = blocks.pop()
    ids = torch.tensor([chance.randrange(1, 90) for _ in range(num_rows)])
    return DecodeInputs(ids, torch.tensor(lengths) + chance.randrange(3), torch.tensor(lengths), table)


def check_random_batches(forward: FlatForward, graphs: DecodeGraphs, chance: random.Random, count: int) -> None:
    for _ in range(count):
        inputs = random_inputs(chance, chance.randint(1, 7))
        replayed: Tensor = graphs.decode(inputs).clone()
        torch.testing.assert_close(replayed, forward.decode(inputs), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["idefics2-window", "gemma3", "blip2"])
def test_recorded_steps_give_the_logits_of_plain_ones(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    """Batches of all sizes in any order, so that every step finds what the last one left behind."""
    recorder, forward = TapeRecorder(), forward_of(tiny_model(name).model)
    graphs = DecodeGraphs(forward, [1, 2, 4], WIDTH, torch.device("cpu"), recorder)
    graphs.record()
    check_random_batches(forward, graphs, random.Random(1), count=20)
    assert recorder.num_recorded == 3
    assert 0 < recorder.num_replayed < 20, "larger batches run as they are"


@torch.inference_mode()
def test_positions_of_more_axes_are_recorded_when_they_come_by() -> None:
    recorder, forward = TapeRecorder(), forward_of(model_of("qwen2-vl"))
    graphs = DecodeGraphs(forward, [2, 8], WIDTH, torch.device("cpu"), recorder)
    graphs.record()
    check_random_batches(forward, graphs, random.Random(2), count=4)
    forward.num_axes = 3
    check_random_batches(forward, graphs, random.Random(3), count=4)
    assert recorder.num_recorded == 4


class _FullRecorder(TapeRecorder):
    """Finds memory full after a few recordings."""

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.num_recorded == 3:
            raise torch.OutOfMemoryError
        return super().__call__(step)


@torch.inference_mode()
def test_steps_that_cannot_be_recorded_any_more_run_as_they_are() -> None:
    recorder, forward = _FullRecorder(), forward_of(model_of("qwen2-vl"))
    graphs = DecodeGraphs(forward, [2, 8], WIDTH, torch.device("cpu"), recorder)
    graphs.record()
    forward.num_axes = 3
    check_random_batches(forward, graphs, random.Random(3), count=6)
    assert recorder.num_recorded == 3
    assert recorder.num_replayed > 0, "the larger size was recorded before"


@torch.inference_mode()
def test_a_smaller_batch_neither_writes_nor_reads_what_a_larger_one_had(idefics2: TinyModel) -> None:
    """Padding rows write to the null block; numbers of former rows, however bad, weigh nothing."""
    forward = forward_of(idefics2.model)
    graphs = DecodeGraphs(forward, [8], WIDTH, torch.device("cpu"), TapeRecorder())
    graphs.record()
    large = random_inputs(random.Random(4), 6, longest=WIDTH * BLOCK_SIZE)
    graphs.decode(large)
    small = random_inputs(random.Random(5), 3, longest=6)
    left = sorted(set(large.block_table.flatten().tolist()) - set(small.block_table.flatten().tolist()) - {0})
    assert len(left) > 8
    for layer in range(3):
        for store in forward._kv.blocks(layer):
            store[left] = torch.nan
    assert graphs.decode(small).isfinite().all()
    for store in forward._kv.blocks(0):
        assert store[left].isnan().all()


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 16, 50, 64, 200, 1024])
def test_no_batch_is_padded_to_more_than_twice_its_size(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    assert len(sizes) <= 36
    for num_rows in range(1, max_num_seqs + 1):
        assert next(size for size in sizes if size >= num_rows) <= max(1, 2 * num_rows)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["idefics2", "gemma3"])
def test_an_engine_that_replays_and_runs_ahead_answers_as_generate_does(
    tiny_model: Callable[[str], TinyModel], name: str
) -> None:
    """All that a GPU does but its kernels: jobs join and leave, so batches of all sizes are padded and replayed."""
    tiny = tiny_model(name)
    runner = build_runner(tiny.model, 6, 128, PagedConfig(block_size=4, num_blocks=120))
    assert isinstance(runner, PagedRunner)
    recorder, num_free = TapeRecorder(), runner.num_free_blocks
    runner._graphs = DecodeGraphs(runner._forward, graph_sizes(4), 32, torch.device("cpu"), recorder)
    runner._graphs.record()
    core = EngineCore(tiny.model, tiny.tokenizer, runner, SchedulerLimits(6, 64), runs_ahead=True)
    jobs = [
        request(tiny.inputs(f"What is number {n}?", [picture(n)]), max_new_tokens=3 + 5 * (n % 4)) for n in range(7)
    ]
    outbox = Outbox()
    for each in jobs:
        core.add(each, submitted_at=0.0)
    while not core.scheduler.is_idle:
        for output in core.step():
            outbox.outputs[output.request_id].append(output)
    for each in jobs:
        expected = tiny.generate(each.inputs, each.sampling.max_new_tokens or 0)
        assert outbox.text(each.request_id) == tiny.tokenizer.decode(expected, skip_special_tokens=True).lstrip()
        assert outbox.finish(each.request_id).num_completion_tokens == len(expected)
    assert recorder.num_replayed > 10
    assert runner.num_free_blocks == num_free
