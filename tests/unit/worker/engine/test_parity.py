"""Whatever joins, leaves, is cancelled or sent back: every answer is the one that sequential `generate` gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests.tiny.families import FAMILIES, picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.tiny.kinds import each_kind
from tests.unit.worker.engine.harness import Outbox, request
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.request import Ended, GenerationRequest
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.models.inputs import ModelInputs

NUM_JOBS = 24
NUM_CANCELLED = 6
MAX_MODEL_LEN = 512
LIMITS = SchedulerLimits(max_num_seqs=7, max_num_batched_tokens=24)

BACKENDS = {
    "slots": None,
    "paged": PagedConfig(block_size=8),
    "paged-whole": PagedConfig(block_size=8, reads_whole=True),
    # Tokens are told a step late.
    "paged-ahead": PagedConfig(block_size=8),
}


@dataclass(frozen=True)
class Job:
    """A prompt and what sequential `generate` says to it."""

    inputs: ModelInputs
    max_new_tokens: int
    expected: list[int]


@cache
def jobs_of(tiny: TinyModel) -> list[Job]:
    """Return mixed jobs; some end after a token or two."""
    chance = random.Random(7)
    jobs = []
    for inputs in mixed_inputs(tiny, NUM_JOBS):
        max_new_tokens = chance.choice([1, 2, chance.randint(3, 40), chance.randint(3, 40)])
        jobs.append(Job(inputs, max_new_tokens, tiny.generate(inputs, max_new_tokens)))
    return jobs


def run_with_random_arrivals(
    core: EngineCore, requests: list[GenerationRequest], cancelled: set[str], seed: int
) -> Outbox:
    """Drive the core step by step; requests arrive at random steps, some are cancelled after two or more tokens."""
    chance = random.Random(seed)
    outbox, coming = Outbox(), list(requests)
    with torch.inference_mode():
        while coming or not core.scheduler.is_idle:
            while coming and chance.random() < 0.5:
                core.add(coming.pop(0), submitted_at=0.0)
            outputs = core.step()
            for each in core.scheduler.everything():
                if each.request_id in cancelled and len(each.output_ids) >= 2 and chance.random() < 0.3:
                    outputs.append(core.end(each, Ended.CANCELLED))
            for output in outputs:
                outbox.outputs[output.request_id].append(output)
    return outbox


def check_answers(tiny: TinyModel, jobs: list[Job], requests: list[GenerationRequest], outbox: Outbox) -> set[str]:
    """Compare every stream with `generate`; a cancelled one must be a prefix. Return the reasons of all ends."""
    reasons: set[str] = set()
    for job, each in zip(jobs, requests, strict=True):
        text = tiny.tokenizer.decode(job.expected, skip_special_tokens=True).lstrip()
        finish = outbox.finish(each.request_id)
        reasons.add(finish.reason)
        if finish.reason is Ended.CANCELLED:
            assert text.startswith(outbox.text(each.request_id))
            continue
        assert outbox.text(each.request_id) == text
        assert finish.num_completion_tokens == len(job.expected)
        outputs = outbox.outputs[each.request_id]
        assert sum(output.num_tokens for output in outputs) == len(job.expected)
        assert [output.is_first for output in outputs].count(True) == 1
    return reasons


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_every_one_of_24_mixed_jobs_equals_sequential_generate(
    tiny_model: Callable[[str], TinyModel], name: str, backend: str
) -> None:
    tiny = tiny_model(name)
    jobs = jobs_of(tiny)
    requests = [request(job.inputs, max_new_tokens=job.max_new_tokens) for job in jobs]
    cancelled = {each.request_id for each in random.Random(7).sample(requests, NUM_CANCELLED)}
    runner = build_runner(tiny.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend])
    assert isinstance(runner, DenseRunner if backend == "slots" or name == "git" else PagedRunner)
    num_free = runner.num_free_blocks if isinstance(runner, PagedRunner) else 0

    core = EngineCore(tiny.model, tiny.tokenizer, runner, LIMITS, runs_ahead=backend == "paged-ahead")
    outbox = run_with_random_arrivals(core, requests, cancelled, seed=3)

    assert check_answers(tiny, jobs, requests, outbox) >= {"length", Ended.CANCELLED}
    if isinstance(runner, PagedRunner):
        assert runner.num_free_blocks == num_free


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("name", ["idefics2-window", "llava", "gemma3", "paligemma", "blip2"])
def test_requests_that_are_sent_back_go_on_where_they_were(
    tiny_model: Callable[[str], TinyModel], name: str, runs_ahead: bool
) -> None:
    """So few blocks that streams push each other out. Gemma3 and PaliGemma read their prompts whole again."""
    tiny = tiny_model(name)
    prompts = [tiny.inputs(f"What is number {n}?", [picture(n)]) for n in range(10)]
    jobs = [Job(inputs, 40, tiny.generate(inputs, 40)) for inputs in prompts]
    requests = [request(job.inputs, max_new_tokens=40) for job in jobs]
    cancelled = {each.request_id for each in random.Random(5).sample(requests, 3)}
    longest = max(inputs.num_prompt_tokens for inputs in prompts) + 40
    runner = build_runner(tiny.model, 7, longest, PagedConfig(block_size=4, num_blocks=longest * 2 // 4))
    assert isinstance(runner, PagedRunner)
    num_free = runner.num_free_blocks
    core = EngineCore(tiny.model, tiny.tokenizer, runner, LIMITS, runs_ahead=runs_ahead)

    outbox = run_with_random_arrivals(core, requests, cancelled, seed=3)

    check_answers(tiny, jobs, requests, outbox)
    assert core.scheduler.num_preempted >= 3
    assert runner.num_free_blocks == num_free


@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_another_image_changes_the_logits(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    """Guards the parity test: a model that ignored its images would pass it."""
    tiny = tiny_model(name)
    with torch.inference_mode():
        one, other = (tiny.model(**tiny.inputs("a", [picture(seed)]).tensors).logits[0, -1] for seed in (1, 2))
    assert (one - other).abs().max() > 0.05
