"""Images and clips of families with native video: every answer of a mixed crowd is what sequential `generate` gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from api_stub.contract.job import Turn
from tests.tiny.families import CORPUS
from tests.tiny.torchvision_families import VIDEO_FAMILIES
from tests.unit.worker.engine.harness import request
from tests.unit.worker.engine.test_parity import BACKENDS, LIMITS, NUM_CANCELLED, Job, check_answers
from tests.unit.worker.engine.test_parity import run_with_random_arrivals as run
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, Part, assistant, clip, image, user
from worker.engine.config import PagedConfig, VisionConfig
from worker.engine.core import EngineCore
from worker.engine.request import Ended
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.media.types import DecodedClip, DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

NUM_JOBS = 20
MAX_MODEL_LEN = 768
SHAPES: tuple[tuple[Part, ...], ...] = (
    (),
    (IMAGE,),
    (VIDEO,),
    (IMAGE, IMAGE, IMAGE),
    (VIDEO, VIDEO),
    ("Compare", VIDEO, "with", IMAGE),
)

Builders = Callable[[str], PromptBuilder]
Loaded = Callable[[str], LoadedModel]


def generate(loaded: LoadedModel, inputs: ModelInputs, max_new_tokens: int) -> list[int]:
    """Return the new tokens of `model.generate`, alone and greedy."""
    with torch.inference_mode():
        ids = loaded.model.generate(**inputs.tensors, max_new_tokens=max_new_tokens, do_sample=False)
    new: list[int] = ids[0, inputs.num_prompt_tokens :].tolist()
    return new


def frames_of(medium: DecodedMedia) -> int:
    return len(medium.frames) if isinstance(medium, DecodedClip) else 1


def conversation(number: int, chance: random.Random) -> tuple[tuple[Turn, ...], list[DecodedMedia]]:
    """Return turns with their media; every shape comes with different words, sizes and numbers of frames."""
    parts = SHAPES[number % len(SHAPES)]
    media: list[DecodedMedia] = []
    for part in parts:
        if part is VIDEO:
            # Never as long as the clip before it: where a family pads clips, it has to.
            num_frames = chance.choice([count for count in range(2, 7) if not media or count != frames_of(media[-1])])
            media.append(clip(100 * number + len(media), num_frames))
        elif part is IMAGE:
            media.append(image(100 * number + len(media), chance.choice([32, 40, 64]), chance.choice([32, 48, 64])))
    words = chance.choice(CORPUS).split()
    asked = user(*parts, " ".join(words[: chance.randint(1, len(words))]))
    return ((asked, assistant("Two cats."), user("And why?")) if chance.random() < 0.2 else (asked,)), media


@cache
def jobs_of(loaded: LoadedModel, builder: PromptBuilder) -> list[Job]:
    """Return mixed jobs; some end after a token or two."""
    chance = random.Random(7)
    jobs = []
    for number in range(NUM_JOBS):
        inputs = builder.prepare(*conversation(number, chance))
        max_new_tokens = chance.choice([1, 2, chance.randint(3, 40), chance.randint(3, 40)])
        jobs.append(Job(inputs, max_new_tokens, generate(loaded, inputs, max_new_tokens)))
    return jobs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_every_one_of_20_mixed_jobs_equals_sequential_generate(
    name: str, backend: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    loaded = loaded_family(name)
    jobs = jobs_of(loaded, builder_of(name))
    assert len({tuple(job.expected[:6]) for job in jobs}) > NUM_JOBS // 2
    requests = [request(job.inputs, max_new_tokens=job.max_new_tokens) for job in jobs]
    # Long jobs, which have not ended by themselves when their cancel comes.
    longest = sorted(range(NUM_JOBS), key=lambda number: jobs[number].max_new_tokens)[-2 * NUM_CANCELLED :]
    cancelled = {requests[number].request_id for number in random.Random(7).sample(longest, NUM_CANCELLED)}
    runner = build_runner(loaded.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, BACKENDS[backend])
    assert isinstance(runner, DenseRunner if backend == "slots" else PagedRunner)

    outbox = run(EngineCore(loaded.model, loaded.tokenizer, runner, LIMITS), requests, cancelled, seed=3)

    assert check_answers(loaded, jobs, requests, outbox) >= {"length", Ended.CANCELLED}


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_requests_about_clips_that_are_sent_back_go_on_where_they_were(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    """Blocks for two prompts and half of their answers. Positions behind a clip are not counts of tokens."""
    loaded = loaded_family(name)
    asked = ((user("What moves", VIDEO, f"in clip {number}?"),) for number in range(8))
    prompts = [builder_of(name).prepare(turns, (clip(number, 4),)) for number, turns in enumerate(asked)]
    jobs = [Job(inputs, 40, generate(loaded, inputs, 40)) for inputs in prompts]
    requests = [request(job.inputs, max_new_tokens=40) for job in jobs]
    longest = max(inputs.num_prompt_tokens for inputs in prompts)
    few_blocks = PagedConfig(block_size=4, num_blocks=(2 * longest + 40) // 4, reuses_prefixes=False)
    runner = build_runner(loaded.model, 7, longest + 40, few_blocks)
    assert isinstance(runner, PagedRunner)
    core = EngineCore(loaded.model, loaded.tokenizer, runner, LIMITS)

    check_answers(loaded, jobs, requests, run(core, requests, set(), seed=3))

    assert core.scheduler.num_preempted >= 2


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_clips_of_one_prompt_that_differ_in_length_are_answered_as_generate_does(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    """In both orders and again in other company; SmolVLM's processor pads the shorter one with frames of zeros."""
    loaded = loaded_family(name)
    clips = [(clip(1, 6), clip(2, 3)), (clip(2, 3), clip(1, 6)), (clip(2, 3), clip(3, 5)), (clip(2, 3), clip(2, 3))]
    prompts = [builder_of(name).prepare((user(VIDEO, VIDEO, "Which is longer?"),), pair) for pair in clips]
    if name == "smolvlm":
        frames = prompts[0].tensors["pixel_values"].flatten(0, 1).flatten(1).any(-1)
        assert (len(frames), int(frames.sum())) == (12, 9), "three frames only pad"
    jobs = [Job(inputs, 8, generate(loaded, inputs, 8)) for inputs in prompts * 2]
    for cache_bytes in (0, 2**20):
        requests = [request(job.inputs, max_new_tokens=8) for job in jobs]
        vision = VisionConfig(cache_bytes, max_pictures=4)
        runner = build_runner(loaded.model, LIMITS.max_num_seqs, MAX_MODEL_LEN, PagedConfig(block_size=8), vision)
        core = EngineCore(loaded.model, loaded.tokenizer, runner, LIMITS, runs_ahead=True)
        check_answers(loaded, jobs, requests, run(core, requests, set(), seed=3))
    assert runner.vision_stats().num_entries > 0, "frames are told apart, those that pad left out"


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
@pytest.mark.parametrize("part", [IMAGE, VIDEO], ids=["image", "clip"])
def test_another_image_or_clip_changes_the_logits(
    name: str, part: Part, loaded_family: Loaded, builder_of: Builders
) -> None:
    """Guards the parity test: a model that ignored its media would pass it."""
    medium: Callable[[int], DecodedMedia] = image if part is IMAGE else lambda seed: clip(seed, 4)
    with torch.inference_mode():
        one, other = (
            loaded_family(name)
            .model(**builder_of(name).prepare((user(part, "a"),), (medium(seed),)).tensors)
            .logits[0, -1]
            for seed in (1, 2)
        )
    assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "smolvlm"])
def test_the_order_and_the_times_of_frames_change_the_logits(
    name: str, loaded_family: Loaded, builder_of: Builders
) -> None:
    forward = clip(1, 4)
    backward = replace(forward, frames=forward.frames[::-1])
    slower = replace(forward, timestamps_s=(0.0, 60.0, 120.0, 180.0), duration_s=240.0, fps=0.0)
    with torch.inference_mode():
        logits = [
            loaded_family(name).model(**builder_of(name).prepare((user(VIDEO, "a"),), (shown,)).tensors).logits[0, -1]
            for shown in (forward, backward, slower)
        ]
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert (logits[0] - logits[2]).abs().max() > 0.01
