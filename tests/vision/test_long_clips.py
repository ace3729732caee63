"""Clips of many frames over minutes: text after a clip stands near the clip's start while its time axis runs on."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest

from tests.tiny.families import CORPUS, picture
from tests.tiny.torchvision_families import VIDEO_FAMILIES
from tests.unit.worker.engine.harness import request
from tests.unit.worker.engine.test_handed import check_handed
from tests.unit.worker.engine.test_parity import BACKENDS, Job, check_answers
from tests.unit.worker.engine.test_parity import run_with_random_arrivals as run
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, Part, image, user
from tests.vision.test_parity import generate
from worker.engine.config import PagedConfig, SchedulerLimits
from worker.engine.core import EngineCore
from worker.engine.runner.build import build_runner
from worker.engine.runner.paged import PagedRunner
from worker.media.types import DecodedClip, DecodedMedia
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]

MAX_MODEL_LEN = 2048
MAX_NEW_TOKENS = 12
LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64)
LENGTHS = ((8, 2.0), (8, 300.0), (16, 120.0), (32, 10.0), (64, 300.0))
LONG = " ".join(CORPUS)


def long_clip(seed: int, num_frames: int, duration_s: float) -> DecodedClip:
    """Return frames of noise, sampled uniformly from a clip of 25 frames per second."""
    times = tuple(duration_s * (index + 0.5) / num_frames for index in range(num_frames))
    frames = tuple(picture(1000 * seed + index, 32, 32) for index in range(num_frames))
    return DecodedClip(frames, times, duration_s, 25.0)


def prompts_of(num_frames: int, duration_s: float) -> list[tuple[tuple[Part, ...], list[DecodedMedia]]]:
    """Return a clip before short and before long text, in the middle, two of them, and one beside an image."""
    clip, other = long_clip(1, num_frames, duration_s), long_clip(2, 8, duration_s / 2)
    return [
        ((VIDEO, "What?"), [clip]),
        ((VIDEO, LONG), [clip]),
        (("In this", VIDEO, "what moves, and where to?"), [clip]),
        ((VIDEO, "and then", VIDEO, "Which is longer?"), [clip, other]),
        ((IMAGE, "Is this in", VIDEO), [image(3, 32, 32), clip]),
        ((VIDEO, "or", IMAGE, "?"), [clip, image(3, 32, 32)]),
    ]


@cache
def jobs_of(loaded: LoadedModel, builder: PromptBuilder, num_frames: int, duration_s: float) -> list[Job]:
    jobs = []
    for parts, media in prompts_of(num_frames, duration_s):
        inputs = builder.prepare((user(*parts),), media)
        if inputs.num_prompt_tokens + MAX_NEW_TOKENS > MAX_MODEL_LEN:
            continue  # SmolVLM spends a picture's tokens on each frame
        jobs.append(Job(inputs, MAX_NEW_TOKENS, generate(loaded, inputs, MAX_NEW_TOKENS)))
    assert len(jobs) >= 3
    return jobs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_frames", "duration_s"), LENGTHS)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_long_clips_are_answered_as_generate_does(
    name: str, num_frames: int, duration_s: float, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    jobs = jobs_of(loaded, builder_of(name), num_frames, duration_s)
    # Each twice: the second time it finds its blocks, and the vision tower's features, again.
    jobs = jobs * 2
    random.Random(5).shuffle(jobs)
    requests = [request(job.inputs, max_new_tokens=MAX_NEW_TOKENS) for job in jobs]
    runner = build_runner(loaded.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend])
    assert isinstance(runner, PagedRunner) == (backend != "slots")
    core = EngineCore(loaded.model, loaded.tokenizer, runner, LIMITS, runs_ahead=backend == "paged-ahead")

    check_answers(loaded, jobs, requests, run(core, requests, set(), seed=3))

    if backend == "paged" and name != "qwen3-vl":  # its deepstack features make it read prompts whole
        assert runner.prefix_stats().num_reused_tokens > 0


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_requests_about_long_clips_that_are_sent_back_go_on_where_they_were(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    asked = [(long_clip(seed, 8, 300.0), f"What moves in clip {seed}?") for seed in range(8)]
    prompts = [builder_of(name).prepare((user(VIDEO, text),), (clip,)) for clip, text in asked]
    jobs = [Job(inputs, 40, generate(loaded, inputs, 40)) for inputs in prompts]
    requests = [request(job.inputs, max_new_tokens=40) for job in jobs]
    longest = max(inputs.num_prompt_tokens for inputs in prompts)
    few_blocks = PagedConfig(block_size=4, num_blocks=(2 * longest + 40) // 4, reuses_prefixes=False)
    runner = build_runner(loaded.model, 4, longest + 40, few_blocks)
    assert isinstance(runner, PagedRunner)
    core = EngineCore(loaded.model, loaded.tokenizer, runner, LIMITS)

    check_answers(loaded, jobs, requests, run(core, requests, set(), seed=3))

    assert core.scheduler.num_preempted >= 2


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_the_time_axis_of_these_clips_runs_ahead_of_the_text(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    """Guards the tests above: with clips whose positions end before the text's, every formula would pass."""
    model = loaded_family(name).model
    inputs = builder_of(name).prepare((user(VIDEO, "What?"),), (long_clip(1, 64, 300.0),))
    arguments = {key: tensor for key, tensor in inputs.tensors.items() if not key.startswith("pixel_values")}
    positions, _ = model.model.get_rope_index(**arguments)
    assert positions.max() > positions[:, 0, -1].max() + 5


@pytest.mark.parametrize("backend", ["slots", "paged"])
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_the_engine_hands_a_model_what_generate_hands_it_for_clips(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    prompts = [
        builder_of(name).prepare((user(*parts),), media)
        for num_frames, duration_s in ((8, 2.0), (16, 120.0))
        for parts, media in prompts_of(num_frames, duration_s)
    ]
    check_handed(loaded_family(name).model, prompts, BACKENDS[backend], MAX_MODEL_LEN)
