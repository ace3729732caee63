"""Whatever joins, leaves or is cancelled: every answer is the one that sequential `generate` gives."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.tiny.families import FAMILIES, picture
from tests.tiny.jobs import TinyModel, mixed_inputs
from tests.unit.worker.engine.harness import Outbox, request
from worker.engine.core import EngineCore
from worker.engine.request import Ended, GenerationRequest
from worker.engine.scheduler import SchedulerLimits

NUM_JOBS = 24
NUM_CANCELLED = 6


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
            for running in list(core.scheduler.running):
                if running.request_id in cancelled and len(running.output_ids) >= 2 and chance.random() < 0.3:
                    outputs.append(core.end(running, Ended.CANCELLED))
            for output in outputs:
                outbox.outputs[output.request_id].append(output)
    return outbox


@pytest.mark.parametrize("name", FAMILIES)
def test_every_one_of_24_mixed_jobs_equals_sequential_generate(
    tiny_model: Callable[[str], TinyModel], name: str
) -> None:
    tiny, chance = tiny_model(name), random.Random(7)
    requests = [
        request(inputs, max_new_tokens=chance.choice([1, 2, chance.randint(3, 40), chance.randint(3, 40)]))
        for inputs in mixed_inputs(tiny, NUM_JOBS)
    ]
    cancelled = {each.request_id for each in chance.sample(requests, NUM_CANCELLED)}
    core = EngineCore(tiny.model, tiny.tokenizer, SchedulerLimits(max_num_seqs=7, max_prefill_tokens=128), 512)

    outbox = run_with_random_arrivals(core, requests, cancelled, seed=3)

    reasons = {}
    for each in requests:
        expected = tiny.generate(each.inputs, each.sampling.max_new_tokens or 0)
        text = tiny.tokenizer.decode(expected, skip_special_tokens=True).lstrip()
        finish = outbox.finish(each.request_id)
        reasons[each.request_id] = finish.reason
        if finish.reason is Ended.CANCELLED:
            assert text.startswith(outbox.text(each.request_id))
            continue
        assert outbox.text(each.request_id) == text
        assert finish.num_completion_tokens == len(expected)
        assert sum(output.num_tokens for output in outbox.outputs[each.request_id]) == len(expected)
    assert set(reasons.values()) >= {"length", Ended.CANCELLED}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_image_changes_the_logits(tiny_model: Callable[[str], TinyModel], name: str) -> None:
    """Guards the parity test: a model that ignored its images would pass it."""
    tiny = tiny_model(name)
    with torch.inference_mode():
        one, other = (tiny.model(**tiny.inputs("a", [picture(seed)]).tensors).logits[0, -1] for seed in (1, 2))
    assert (one - other).abs().max() > 0.05
