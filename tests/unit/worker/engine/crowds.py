"""Mixed crowds of jobs about any family, prepared as a worker prepares them, and what `generate` says to each alone."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from transformers import AutoProcessor

from api_stub.contract.conversation import Turn
from tests.tiny.families import CORPUS
from tests.unit.worker.engine.harness import Outbox, request
from tests.unit.worker.engine.test_parity import LIMITS, Job, check_answers, run_with_random_arrivals
from tests.unit.worker.prompting.conversations import IMAGE, VIDEO, Part, assistant, clip, image, upstream, user
from worker.engine.config import PagedConfig, VisionConfig
from worker.engine.core import EngineCore
from worker.engine.request import Ended
from worker.engine.runner.build import build_runner
from worker.engine.runner.dense import DenseRunner
from worker.engine.runner.paged import PagedRunner
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

MAX_MODEL_LEN = 768
NUM_CANCELLED = 3
#: Sides of pictures: square, wide, high, small, and some that no patch or tile divides.
SIDES = ((32, 32), (64, 32), (40, 64), (90, 40), (48, 100), (20, 20))
SHAPES: tuple[tuple[Part, ...], ...] = (
    (IMAGE,),
    (),
    (IMAGE, IMAGE, IMAGE),
    (VIDEO,),
    ("Compare", IMAGE, "with", IMAGE),
    ("Compare", VIDEO, "with", IMAGE),
    (VIDEO, VIDEO),
)


def generate(loaded: LoadedModel, inputs: ModelInputs, max_new_tokens: int) -> list[int]:
    """Return the new tokens of `model.generate`, alone and greedy."""
    with torch.inference_mode():
        ids = loaded.model.generate(**inputs.tensors, max_new_tokens=max_new_tokens, do_sample=False)
    new: list[int] = ids[0, inputs.num_prompt_tokens :].tolist()
    return new


def prepare(builder: PromptBuilder, turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> ModelInputs:
    """Prepare a prompt."""
    with as_numpy_1():
        return builder.prepare(turns, media)


@contextmanager
def as_numpy_1() -> Iterator[None]:
    """Hear nothing of what NumPy 2 says of the processors of PaliGemma and GLM-4V."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        yield


def question(loaded: LoadedModel, number: int, chance: random.Random) -> tuple[tuple[Turn, ...], list[DecodedMedia]]:
    """Return turns with media of every shape that the family can be asked about, each time of other sizes."""
    captioner = loaded.capabilities.captioner
    parts = SHAPES[number % len(SHAPES)]
    if captioner is not None:
        parts = (IMAGE,) * (1 if captioner.max_images == 1 else chance.choice([1, 1, 2, 3]))
    media: list[DecodedMedia] = []
    for part in parts:
        if part is VIDEO:
            media.append(clip(100 * number + len(media), 2 + (number + 2 * len(media)) % 5))
        elif part is IMAGE:
            media.append(image(100 * number + len(media), *chance.choice(SIDES)))
    words = chance.choice(CORPUS).split()
    asked = user(*parts, " ".join(words[: chance.randint(1, len(words))]))
    if captioner is None and chance.random() < 0.2:
        return (asked, assistant("Two cats."), user("And why?")), media
    return (asked,), media


@cache
def prompts_of(loaded: LoadedModel, builder: PromptBuilder, count: int) -> tuple[ModelInputs, ...]:
    """Return `count` prompts of mixed shapes."""
    chance = random.Random(7)
    return tuple(prepare(builder, *question(loaded, number, chance)) for number in range(count))


@cache
def jobs_of(loaded: LoadedModel, builder: PromptBuilder, count: int) -> list[Job]:
    """Return mixed jobs; some end after a token or two."""
    chance = random.Random(5)
    jobs = []
    for inputs in prompts_of(loaded, builder, count):
        max_new_tokens = chance.choice([1, 2, chance.randint(3, 30), chance.randint(12, 30)])
        jobs.append(Job(inputs, max_new_tokens, generate(loaded, inputs, max_new_tokens)))
    return jobs


def check_crowd(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    paged: PagedConfig | None,
    *,
    runs_ahead: bool = False,
    vision: VisionConfig | None = None,
    length: int = MAX_MODEL_LEN,
    num_cancelled: int = NUM_CANCELLED,
) -> tuple[PagedRunner | DenseRunner, EngineCore]:
    """Let the jobs arrive at random, cancel some of the long ones, compare every text with `generate`'s."""
    requests = [request(job.inputs, max_new_tokens=job.max_new_tokens) for job in jobs]
    longest = sorted(range(len(jobs)), key=lambda number: jobs[number].max_new_tokens)[-2 * num_cancelled :]
    chosen = random.Random(7).sample(longest, num_cancelled) if num_cancelled else []
    cancelled = {requests[number].request_id for number in chosen}
    runner = build_runner(loaded.model, LIMITS.max_num_seqs, length, paged, vision)
    num_free = runner.num_free_blocks if isinstance(runner, PagedRunner) else 0
    core = EngineCore(
        loaded.model, loaded.tokenizer, runner, LIMITS, runs_ahead=runs_ahead and isinstance(runner, PagedRunner)
    )
    outbox: Outbox = run_with_random_arrivals(core, requests, cancelled, seed=3)
    reasons = check_answers(loaded, list(jobs), requests, outbox)
    assert not num_cancelled or reasons >= {"length", Ended.CANCELLED}
    if isinstance(runner, PagedRunner):
        assert runner.num_free_blocks == num_free
    return runner, core


def check_sent_back(loaded: LoadedModel, builder: PromptBuilder) -> int:
    """Serve from so few blocks that streams push each other out; return how often, 0 where rows serve."""
    chance = random.Random(11)
    kinds = (IMAGE,) if loaded.capabilities.captioner is not None else (IMAGE, VIDEO)
    prompts = []
    for number in range(8):
        part = kinds[number % len(kinds)]
        medium = clip(number, 4) if part is VIDEO else image(number, *chance.choice(SIDES))
        prompts.append(prepare(builder, (user(part, f"What is number {number}?"),), (medium,)))
    jobs = [Job(inputs, 30, generate(loaded, inputs, 30)) for inputs in prompts]
    longest = max(inputs.num_prompt_tokens + 8 for inputs in prompts) + 30
    few = PagedConfig(block_size=4, num_blocks=(2 * longest + 30) // 4, reuses_prefixes=False)
    _, core = check_crowd(loaded, jobs, few, runs_ahead=True, length=longest, num_cancelled=0)
    return core.scheduler.num_preempted


def check_vision_cache(loaded: LoadedModel, builder: PromptBuilder, paged: PagedConfig | None, count: int) -> None:
    """Ask everything twice, with and without a cache of features, pictures looked at ahead of their turn."""
    jobs = jobs_of(loaded, builder, count)
    for cache_bytes in (0, 2**20):
        vision = VisionConfig(cache_bytes, max_pictures=4)
        check_crowd(loaded, [*jobs, *jobs], paged, runs_ahead=True, vision=vision, num_cancelled=0)


def upstream_form(
    loaded: LoadedModel, inputs: ModelInputs, turns: Sequence[Turn], media: Sequence[DecodedMedia]
) -> str:
    """Return how the family's own chat path was followed, tensor by tensor: clips "whole" or "as frames"."""
    processor = AutoProcessor.from_pretrained(loaded.model.name_or_path)
    for form in ("as frames", "whole"):
        try:
            with as_numpy_1():
                expected = upstream(processor, turns, media, keep_clips=form == "whole")
        except (ValueError, TypeError, RuntimeError):
            continue
        if inputs.tensors.keys() == expected.keys() and all(
            inputs.tensors[key].equal(expected[key]) for key in expected
        ):
            return form
    raise AssertionError("the prompt is not what the family's processor makes of it")


def check_prompts(loaded: LoadedModel, builder: PromptBuilder) -> None:
    """Every shape of prompt is what the family's own chat path makes of it."""
    chance = random.Random(7)
    for number in range(len(SHAPES)):
        turns, media = question(loaded, number, chance)
        upstream_form(loaded, prepare(builder, turns, media), turns, media)


def check_pictures_matter(loaded: LoadedModel, builder: PromptBuilder) -> None:
    """Another first picture, another last one, and another order: each must change the logits."""
    is_single = loaded.capabilities.captioner is not None and loaded.capabilities.captioner.max_images == 1
    shown = [(1,), (2,)] if is_single else [(1,), (2,), (1, 2), (1, 3), (3, 2), (2, 1)]
    logits = []
    for seeds in shown:
        asked = (user(*[IMAGE] * len(seeds), "a"),)
        inputs = prepare(builder, asked, [image(seed) for seed in seeds])
        with torch.inference_mode():
            logits.append(loaded.model(**inputs.tensors).logits[0, -1])
    for at, one in enumerate(logits):
        for other in logits[at + 1 :]:
            assert (one - other).abs().max() > 0.01
