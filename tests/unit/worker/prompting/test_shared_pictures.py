"""Decoded media are shared between jobs: whatever prompts are made of them, by many threads at once, pixels stay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from api_stub.contract.job import CaptionJob, VideoQaJob
from tests.tiny.families import CHAT_FAMILIES, FAMILIES
from tests.tiny.kinds import each_kind
from tests.unit.worker.prompting.conversations import clip, frames_of, image
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.prompting.prepare import PromptBuilder

# PaliGemma's processor makes labels in a way NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Builders = Callable[[str], PromptBuilder]
WIDE = image(1, 96, 40)
STILL = "s3://media/scene.png"
MOVING = "s3://media/clip.mp4"


def digests(media: Sequence[DecodedMedia]) -> list[tuple[int, str, tuple[int, int], str]]:
    """Return what may not change about each picture: its buffer, mode, size and pixels."""
    return [
        (id(picture.im), picture.mode, picture.size, hashlib.sha256(picture.tobytes()).hexdigest())
        for picture in pictures_of(media)
    ]


def pictures_of(media: Sequence[DecodedMedia]) -> list[Image.Image]:
    return [picture for medium in media for picture in frames_of(medium)]


def at_once(prepare: Callable[[], ModelInputs], num_jobs: int = 8) -> list[ModelInputs]:
    with ThreadPoolExecutor(num_jobs) as pool:
        return [done.result() for done in [pool.submit(prepare) for _ in range(num_jobs)]]


def assert_all_equal(prepared: Sequence[ModelInputs]) -> None:
    first, *others = (inputs.tensors for inputs in prepared)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert all(first[name].data_ptr() != other[name].data_ptr() for name in first), "each job has its own tensors"


@pytest.mark.parametrize("name", each_kind(FAMILIES))
def test_a_still_is_the_same_after_many_jobs_at_once(name: str, builder_of: Builders) -> None:
    builder = builder_of(name)
    turns = builder.turns(CaptionJob(media=(STILL,)))
    before = digests([WIDE])
    assert_all_equal(at_once(lambda: builder.prepare(turns, [WIDE])))
    assert digests([WIDE]) == before


@pytest.mark.parametrize("name", each_kind(CHAT_FAMILIES))
def test_stills_and_frames_are_the_same_after_many_jobs_at_once(name: str, builder_of: Builders) -> None:
    builder, media = builder_of(name), [clip(2, 3), WIDE, WIDE]
    job = VideoQaJob(media=(MOVING, STILL, STILL), question="What <image> moves?")
    before = digests(media)
    assert_all_equal(at_once(lambda: builder.prepare(builder.turns(job), media)))
    assert digests(media) == before


def test_a_changed_pixel_would_be_seen() -> None:
    media = [image(3)]
    before = digests(media)
    media[0].pixels.putpixel((4, 4), (1, 2, 3))
    assert digests(media) != before
