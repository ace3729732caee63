"""Everything at once, by chance: arrivals, cancels, preemption, ends of every kind; texts hold and nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.unit.worker.engine.harness import Outbox, request
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.request import Ended, GenerationRequest
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.models.inputs import ModelInputs

pytestmark = pytest.mark.check

SEEDS = range(4)
NUM_PROMPTS, NUM_JOBS, MAX_TOKENS = 8, 18, 36
MAX_MODEL_LEN = 320
LIMITS = SchedulerLimits(max_num_seqs=5, max_num_batched_tokens=32)
NO_TOKEN = 10**6

BACKENDS = {
    "slots": None,
    "paged": PagedConfig(block_size=8),
    "paged-few-blocks": PagedConfig(block_size=4, num_blocks=MAX_MODEL_LEN // 4 + 12),
    "paged-whole": PagedConfig(block_size=8, reads_whole=True, reuses_prefixes=False),
}


@dataclass(frozen=True)
class Case:
    """A request and what it must say; the last token counts as `ends` has it."""

    generation: GenerationRequest
    text: str
    reason: str
    num_tokens: int | None


@cache
def prompts_of(tiny: TinyModel) -> list[tuple[ModelInputs, list[int]]]:
    """Return prompts and how they go on when nothing ends them."""
    found = mixed_inputs(tiny, NUM_PROMPTS, seed=3)
    return [(inputs, tiny.generate(inputs, MAX_TOKENS, eos_token_id=NO_TOKEN)) for inputs in found]


def case_of(tiny: TinyModel, chance: random.Random, ends: set[int]) -> Case:
    """Draw a request: short or long, with a stop string or without."""
    inputs, free = chance.choice(prompts_of(tiny))
    num_tokens = chance.choice([1, 2, chance.randint(3, MAX_TOKENS), chance.randint(3, MAX_TOKENS)])
    ids = free[:num_tokens]
    place = next((place for place, token in enumerate(ids) if token in ends), None)
    reason = "length" if place is None else "stop"
    shown = ids if place is None else ids[:place]
    text = tiny.tokenizer.decode(shown, skip_special_tokens=True).lstrip()
    length = len(ids) if place is None else place + 1
    begin = chance.randrange(max(1, len(text)))
    stop = text[begin : begin + chance.randint(1, 3)]
    if chance.random() < 0.7 or not stop or "\N{REPLACEMENT CHARACTER}" in stop:
        return Case(request(inputs, num_tokens), text, reason, length)
    generation = request(inputs, num_tokens, stop=("never to be seen", stop))
    return Case(generation, text[: text.index(stop)], "stop_sequence", None)


@contextmanager
def ending_with(tiny: TinyModel, tokens: Sequence[int]) -> Iterator[None]:
    """Let these tokens end an answer."""
    config = tiny.model.generation_config
    before = config.eos_token_id
    config.eos_token_id = list(tokens)
    try:
        yield
    finally:
        config.eos_token_id = before


def drive(core: EngineCore, cases: list[Case], chance: random.Random) -> Outbox:
    """Step until all have ended; some are cancelled wherever they are, as a deadline would, some are sent back."""
    outbox, coming = Outbox(), [case.generation for case in cases]
    can_resume = isinstance(core._runner, PagedRunner)
    with torch.inference_mode():
        while coming or not core.scheduler.is_idle:
            while coming and chance.random() < 0.6:
                core.add(coming.pop(0), submitted_at=0.0)
            if can_resume and len(core.scheduler.running) > 1 and chance.random() < 0.05:
                core.scheduler.send_back(chance.choice(core.scheduler.running[1:]))
            outputs = core.step()
            if core.scheduler.everything() and chance.random() < 0.08:
                outputs.append(core.end(chance.choice(core.scheduler.everything()), Ended.CANCELLED))
            for output in outputs:
                outbox.outputs[output.request_id].append(output)
    return outbox


def check(case: Case, outbox: Outbox) -> str:
    """Compare what was streamed with what was to be said; return the end."""
    request_id = case.generation.request_id
    finish, text = outbox.finish(request_id), outbox.text(request_id)
    outputs = outbox.outputs[request_id]
    if finish.reason is Ended.CANCELLED:
        assert case.text.startswith(text)
        return finish.reason
    assert (text, finish.reason) == (case.text, case.reason)
    assert case.num_tokens in (None, finish.num_completion_tokens)
    assert sum(output.num_tokens for output in outputs) == finish.num_completion_tokens
    assert [output.is_first for output in outputs].count(True) == 1
    return finish.reason


def check_nothing_is_left(core: EngineCore, runner: PagedRunner | DenseRunner, num_free: int) -> None:
    assert not core._texts
    assert (core.scheduler.num_running, core.scheduler.num_waiting) == (0, 0)
    if isinstance(runner, DenseRunner):
        assert not runner._rows
        return
    assert runner.num_free_blocks == num_free
    assert not runner._tables.table.any()
    assert not runner._tables.num_sequences
    assert not runner._prompts
    assert not runner._keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_happens_texts_hold_and_nothing_leaks(idefics2: TinyModel, backend: str) -> None:
    reasons: list[str] = []
    num_preempted = num_empty = 0
    runner = build_runner(idefics2.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend])
    num_free = runner.num_free_blocks if isinstance(runner, PagedRunner) else 0
    for seed in SEEDS:
        chance = random.Random(seed)
        # One prompt ends with its first token, another a little later.
        ends = [prompts_of(idefics2)[seed][1][0], prompts_of(idefics2)[seed + 1][1][6]]
        cases = [case_of(idefics2, chance, set(ends)) for _ in range(NUM_JOBS)]
        with ending_with(idefics2, ends):
            core = EngineCore(idefics2.model, idefics2.tokenizer, runner, LIMITS)
            outbox = drive(core, cases, chance)
        reasons += [check(case, outbox) for case in cases]
        check_nothing_is_left(core, runner, num_free)
        num_preempted += core.scheduler.num_preempted
        num_empty += sum(case.num_tokens == 1 and case.reason == "stop" for case in cases)
    assert set(reasons) == {"length", "stop", "stop_sequence", "cancelled"}
    assert num_empty > 0, "an answer of the end token alone"
    assert (num_preempted > 0) is (backend != "slots")
