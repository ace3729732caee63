"""Steps whose tokens are told while the next one runs: nothing else about the answers changes."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
import torch

from tests.tiny.families import picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.unit.worker.engine.harness import Outbox, request
from tests.unit.worker.engine.test_paged import fed_tokens
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.request import Ended, GenerationRequest, RequestOutput
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import PagedRunner
from worker.engine.tensors import HostCopy

SAMPLED = [
    {"temperature": 1.0, "repetition_penalty": 3.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.5},
    {"temperature": 1.5, "min_p": 0.01, "min_new_tokens": 6},
    {"repetition_penalty": 4.0, "min_new_tokens": 3},
    {"temperature": 1.0, "top_p": 0.6},
]


def core_of(tiny: TinyModel, *, runs_ahead: bool, num_blocks: int = 0) -> tuple[EngineCore, PagedRunner]:
    runner = build_runner(tiny.model, 5, 160, PagedConfig(block_size=4, num_blocks=num_blocks))
    assert isinstance(runner, PagedRunner)
    return EngineCore(tiny.model, tiny.tokenizer, runner, SchedulerLimits(5, 64), runs_ahead=runs_ahead), runner


def run(core: EngineCore, requests: list[GenerationRequest]) -> list[list[RequestOutput]]:
    """Submit everything and return what each step says."""
    steps = []
    with torch.inference_mode():
        for each in requests:
            core.add(each, submitted_at=0.0)
        while not core.scheduler.is_idle:
            steps.append(core.step())
    return steps


def test_a_step_tells_what_the_one_before_made_and_nothing_is_fed_too_much(idefics2: TinyModel) -> None:
    each = request(idefics2.inputs("short"), max_new_tokens=4)
    told = {}
    for runs_ahead in (False, True):
        core, _ = core_of(idefics2, runs_ahead=runs_ahead)
        with fed_tokens(idefics2) as sizes:
            steps = run(core, [each])
        told[runs_ahead] = [sum(output.num_tokens for output in outputs) for outputs in steps]
        # The capture of the prompt, the prompt, and three of the four tokens.
        assert sizes[-3:] == [1, 1, 1]
        assert len(sizes) == 5
    assert sum(told[False]) == 4
    assert told[True] == [0, *told[False]]


def test_what_comes_after_an_end_is_not_told_and_leaves_nothing_behind(idefics2: TinyModel) -> None:
    """The token that ends the answer is fed before the host knows it."""
    core, runner = core_of(idefics2, runs_ahead=True)
    num_free = runner.num_free_blocks
    each = request(idefics2.inputs("What is it?", [picture(3)]), max_new_tokens=40)
    expected = idefics2.generate(each.inputs, 40)
    end = next(place for place in range(2, 40) if expected[place] not in expected[:place])
    core._eos_token_ids = frozenset([expected[end]])
    with fed_tokens(idefics2) as sizes:
        outputs = [output for step in run(core, [each]) for output in step]
    assert sizes.count(1) == end + 1
    finish = outputs[-1].finish
    assert finish is not None
    assert (finish.reason, finish.num_completion_tokens) == ("stop", end + 1)
    assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    text = "".join(output.text for output in outputs)
    assert text == idefics2.tokenizer.decode(expected[:end], skip_special_tokens=True).lstrip()
    assert runner.num_free_blocks == num_free


@pytest.mark.parametrize("num_blocks", [0, 42])
def test_drawn_tokens_and_penalties_are_the_same_a_step_late(idefics2: TinyModel, num_blocks: int) -> None:
    """The sampler never waits for tokens, so it learns of some from the device. With few blocks requests go back."""
    prompts = mixed_inputs(idefics2, 12)
    texts = []
    for runs_ahead in (False, True):
        core, _ = core_of(idefics2, runs_ahead=runs_ahead, num_blocks=num_blocks)
        requests = [
            request(inputs, max_new_tokens=14 + 3 * (number % 7), seed=number, **SAMPLED[number % len(SAMPLED)])
            for number, inputs in enumerate(prompts)
        ]
        outbox = Outbox()
        for output in [output for step in run(core, requests) for output in step]:
            outbox.outputs[output.request_id].append(output)
        texts.append([(outbox.text(each.request_id), outbox.finish(each.request_id).reason) for each in requests])
        assert (core.scheduler.num_preempted > 0) == bool(num_blocks)
    assert texts[0] == texts[1]
    assert len({text for text, _ in texts[0]}) > 6


def test_a_request_that_is_cancelled_with_a_token_under_way_hears_no_more(idefics2: TinyModel) -> None:
    core, runner = core_of(idefics2, runs_ahead=True)
    num_free = runner.num_free_blocks
    requests = [request(idefics2.inputs(f"number {number}"), max_new_tokens=30) for number in range(3)]
    chance = random.Random(1)
    with torch.inference_mode():
        for each in requests:
            core.add(each, submitted_at=0.0)
        for _ in range(chance.randint(5, 9)):
            core.step()
        cancelled = core.scheduler.find(requests[1].request_id)
        assert cancelled is not None
        assert cancelled.num_pending == 1
        last = core.end(cancelled, Ended.CANCELLED)
        assert last.finish is not None
        assert last.finish.num_completion_tokens == len(cancelled.output_ids)
        outputs = [output for _ in range(40) for output in core.step()]
    assert core.scheduler.is_idle
    assert requests[1].request_id not in {output.request_id for output in outputs}
    assert [output.finish.reason for output in outputs if output.finish] == ["length", "length"]
    assert runner.num_free_blocks == num_free


def test_an_error_that_the_device_tells_late_ends_those_it_concerns(
    idefics2: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, _ = core_of(idefics2, runs_ahead=True)
    requests = [request(idefics2.inputs(f"number {number}"), max_new_tokens=30) for number in range(2)]

    def lost(_copy: HostCopy) -> list[int]:
        raise torch.AcceleratorError("device lost")

    with torch.inference_mode():
        for each in requests:
            core.add(each, submitted_at=0.0)
        for _ in range(4):
            core.step()
        monkeypatch.setattr(HostCopy, "wait", lost)
        outputs = core.step()
    assert core.is_dead
    assert {output.request_id for output in outputs} == {each.request_id for each in requests}
    for output in outputs:
        assert output.finish is not None
        assert output.finish.reason is Ended.FAILED
        assert asdict(output.finish)["error"] is not None


def test_a_copy_to_the_host_is_of_its_moment() -> None:
    tokens = torch.tensor([3, 1, 2])
    copy = HostCopy(tokens)
    tokens.zero_()
    assert copy.wait() == [3, 1, 2]
