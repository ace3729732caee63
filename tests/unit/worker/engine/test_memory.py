"""Memory: steps that do not fit into it, and what earlier owners leave in keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.unit.worker.engine.harness import Outbox, request
from worker.engine import sampler
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.request import Ended, GenerationRequest, Request
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner

NUM_TOKENS = 20
LIMITS = SchedulerLimits(max_num_seqs=6, max_num_batched_tokens=400)


def core_of(
    tiny: TinyModel, paged: PagedConfig | None, *, runs_ahead: bool = False
) -> tuple[EngineCore, PagedRunner | DenseRunner]:
    runner = build_runner(tiny.model, LIMITS.max_num_seqs, 1024, paged)
    return EngineCore(tiny.model, tiny.tokenizer, runner, LIMITS, runs_ahead=runs_ahead), runner


def serve(core: EngineCore, requests: list[GenerationRequest]) -> Outbox:
    outbox = Outbox()
    for each in requests:
        core.add(each, submitted_at=0.0)
    with torch.inference_mode():
        while not core.scheduler.is_idle:
            assert not core.is_dead
            for output in core.step():
                outbox.outputs[output.request_id].append(output)
    return outbox


def expected(tiny: TinyModel, generation: GenerationRequest) -> str:
    ids = tiny.generate(generation.inputs, generation.sampling.max_new_tokens or 0)
    text: str = tiny.tokenizer.decode(ids, skip_special_tokens=True)
    return text.lstrip()


@contextmanager
def little_memory(tiny: TinyModel, fits: Callable[[int, int], bool]) -> Iterator[list[tuple[int, int]]]:
    """Let the text model's layers raise for states of rows and tokens that do not fit; yield those that did not."""
    failed: list[tuple[int, int]] = []

    def check(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if not fits(states.shape[0], states.shape[1]):
            failed.append((states.shape[0], states.shape[1]))
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    # The last layer: the others have written their keys and values by then.
    hook = tiny.model.model.text_model.layers[-1].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield failed
    finally:
        hook.remove()


def test_streams_that_do_not_fit_together_take_turns_on_blocks(idefics2: TinyModel) -> None:
    core, runner = core_of(idefics2, PagedConfig(block_size=8))
    assert isinstance(runner, PagedRunner)
    num_free = runner.num_free_blocks
    requests = [request(inputs, NUM_TOKENS) for inputs in mixed_inputs(idefics2, 6)]
    with little_memory(idefics2, lambda rows, tokens: not 3 < tokens <= 6) as failed:
        outbox = serve(core, requests)
    assert [tokens for _, tokens in failed[:3]] == [6, 5, 4], "in one step"
    assert len(failed) < 12, "who was sent back waits until another has ended"
    for each in requests:
        assert outbox.finish(each.request_id).reason in ("length", "stop")
        assert outbox.text(each.request_id) == expected(idefics2, each)
    assert core.scheduler.num_preempted >= 3
    assert runner.num_free_blocks == num_free


def test_streams_that_do_not_fit_together_lose_the_youngest_in_rows(idefics2: TinyModel) -> None:
    core, _ = core_of(idefics2, None)
    requests = [request(inputs, NUM_TOKENS) for inputs in mixed_inputs(idefics2, 6)]
    with little_memory(idefics2, lambda rows, tokens: rows <= 3):
        outbox = serve(core, requests)
    for each in requests[:3]:
        assert outbox.text(each.request_id) == expected(idefics2, each)
    for each in requests[3:]:
        finish = outbox.finish(each.request_id)
        assert finish.error is not None
        assert (finish.reason, finish.error.code) == (Ended.FAILED, "out_of_memory")


@pytest.mark.parametrize("paged", [None, PagedConfig(8), PagedConfig(8, reads_whole=True)], ids=str)
def test_a_prompt_that_does_not_fit_fails_alone(idefics2: TinyModel, paged: PagedConfig | None) -> None:
    """Together the others do not fit into one step either."""
    core, _ = core_of(idefics2, paged)
    requests = [request(idefics2.inputs(f"number {n}", [picture(n)]), NUM_TOKENS) for n in range(4)]
    large = request(idefics2.inputs("long " * 150), NUM_TOKENS)
    size = max(each.inputs.num_prompt_tokens for each in requests)
    assert large.inputs.num_prompt_tokens > size + LIMITS.max_num_seqs
    with little_memory(idefics2, lambda rows, tokens: tokens <= size + LIMITS.max_num_seqs) as failed:
        outbox = serve(core, [*requests[:2], large, *requests[2:]])
    assert failed
    for each in requests:
        assert outbox.text(each.request_id) == expected(idefics2, each)
    error = outbox.finish(large.request_id).error
    assert error is not None
    assert error.code == "out_of_memory"


def test_an_engine_in_which_no_stream_fits_dies(idefics2: TinyModel) -> None:
    core, _ = core_of(idefics2, PagedConfig(8))
    for number in range(5):
        core.add(request(idefics2.inputs(f"number {number}"), NUM_TOKENS), submitted_at=0.0)
    with little_memory(idefics2, lambda rows, tokens: tokens > 5), torch.inference_mode():
        outputs = [output for _ in range(10) if not core.is_dead for output in core.step()]
    assert core.is_dead
    assert [output.finish.error.code for output in outputs if output.finish and output.finish.error] == [
        "out_of_memory"
    ] * 3


DRAWN: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 2.0},
    {"temperature": 1.0, "repetition_penalty": 3.0, "min_new_tokens": 4},
    {"repetition_penalty": 4.0},
]


@pytest.mark.parametrize("paged", [None, PagedConfig(8)], ids=["slots", "paged"])
@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("fits_alone", [True, False])
def test_rows_that_cannot_be_sampled_together_are_sampled_alone(
    idefics2: TinyModel,
    paged: PagedConfig | None,
    runs_ahead: bool,
    fits_alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [request(idefics2.inputs(f"number {n}"), NUM_TOKENS, seed=n, **drawn) for n, drawn in enumerate(DRAWN)]
    unlucky = request(idefics2.inputs("number 9"), NUM_TOKENS, seed=9, temperature=1.0, top_p=0.9)
    expected = serve(core_of(idefics2, paged, runs_ahead=runs_ahead)[0], [*requests, unlucky])
    choose, num_failures = sampler._choose, 0

    def choose_in_little_memory(logits: Tensor, batch: sampler._Batch) -> Tensor:
        nonlocal num_failures
        is_unlucky = any(each.request_id == unlucky.request_id for each in batch.requests)
        if len(batch.requests) > 1 or (is_unlucky and not fits_alone):
            num_failures += 1
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return choose(logits, batch)

    monkeypatch.setattr(sampler, "_choose", choose_in_little_memory)
    core, _ = core_of(idefics2, paged, runs_ahead=runs_ahead)
    outbox = serve(core, [requests[0], unlucky, *requests[1:]])
    assert num_failures >= 3
    for each in [*requests, *([unlucky] if fits_alone else [])]:
        assert outbox.finish(each.request_id).reason in ("length", "stop")
        assert outbox.text(each.request_id) == expected.text(each.request_id)
    error = outbox.finish(unlucky.request_id).error
    assert (error is None) is fits_alone
    assert error is None or error.code == "out_of_memory"


def poison(runner: PagedRunner | DenseRunner, victim: Request) -> None:
    """Write NaN over all keys and values of a running request, as an overflow would."""
    if isinstance(runner, PagedRunner):
        num_tokens = max(victim.num_cached_tokens, victim.num_prompt_cached)
        for layer in runner._kv._keys:
            for blocks in runner._kv.blocks(layer):
                blocks[runner._tables.blocks(victim.row, num_tokens)] = torch.nan
    else:
        for rows in (*runner._cache._keys, *runner._cache._values):
            rows[victim.row, :, : victim.num_cached_tokens] = torch.nan


@pytest.mark.parametrize("paged", [None, PagedConfig(4, reuses_prefixes=False)], ids=["slots", "paged"])
@pytest.mark.parametrize("name", ["idefics2", "idefics2-window", "gemma3"])
def test_nan_that_a_request_leaves_does_not_reach_the_next(
    tiny_model: Callable[[str], TinyModel], name: str, paged: PagedConfig | None
) -> None:
    tiny = tiny_model(name)
    core, runner = core_of(tiny, paged)
    companion = request(tiny.inputs("beside " * 12, [picture(9)]), 60)
    victims = [request(tiny.inputs("poisoned " * 20, [picture(n)]), 100) for n in range(5)]
    with torch.inference_mode():
        for each in (*victims[:2], companion, *victims[2:]):
            core.add(each, submitted_at=0.0)
        outputs = core.step() + core.step()
        for each in victims:
            victim = core.scheduler.find(each.request_id)
            assert victim is not None
            poison(runner, victim)
            core.end(victim, Ended.CANCELLED)
    requests = [request(tiny.inputs(f"next {n}"), NUM_TOKENS) for n in range(5)]
    outbox = Outbox()
    for output in outputs:
        outbox.outputs[output.request_id].append(output)
    for request_id, others in serve(core, requests).outputs.items():
        outbox.outputs[request_id] += others
    for each in (companion, *requests):
        assert outbox.finish(each.request_id).reason in ("length", "stop")
        assert outbox.text(each.request_id) == expected(tiny, each)
