"""Mixed jobs of every chat family through the real queue: greedy text equals sequential `generate`, job by job."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest
from PIL import Image

from api_stub.client.client import Client
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server
from tests.tiny.families import picture
from tests.tiny.reference import Messages, Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.check

NUM_JOBS = 24
NUM_FRAMES = 6
WORDS = ("describe", "the", "cat", "flower", "picture", "please", "how", "many", "people", "are", "there")


@dataclass(frozen=True)
class Asked:
    """One job in the client's words and in upstream's."""

    task: str
    options: dict[str, Any]
    messages: Messages
    max_new_tokens: int


class Shelf:
    """Media in S3 together with the pixels that upstream gets."""

    def __init__(self, s3: S3Client, directory: Path, prefix: str) -> None:
        self._s3, self._directory, self._prefix = s3, directory, prefix
        self._count = 0

    def image(self, rng: random.Random) -> tuple[str, Image.Image]:
        """Store a lossless picture."""
        pixels = picture(rng.randrange(10_000), rng.choice((32, 48, 64)), rng.choice((32, 40, 72)))
        path = self._next(".png")
        pixels.save(path)
        return self._stored(path), pixels

    def clip(self, rng: random.Random) -> tuple[str, list[Image.Image]]:
        """Store a clip; upstream gets the frames that are decoded from it."""
        from worker.media.types import MediaPolicy
        from worker.media.video import sample_clip

        path = self._next(".avi")
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (48, 48))
        for frame in range(rng.randint(7, 15)):
            writer.write(cv2.cvtColor(_pixels(picture(rng.randrange(10_000) + frame)), cv2.COLOR_RGB2BGR))
        writer.release()
        policy = MediaPolicy(buckets=frozenset({"media"}))
        frames = sample_clip(path, NUM_FRAMES, policy, should_stop=lambda: None).frames
        return self._stored(path), list(frames)

    def _next(self, suffix: str) -> Path:
        self._count += 1
        return self._directory / f"{self._prefix}-{self._count}{suffix}"

    def _stored(self, path: Path) -> str:
        self._s3.upload_file(str(path), "media", path.name)
        return f"s3://media/{path.name}"


def _pixels(image: Image.Image) -> Any:
    import numpy as np

    return np.asarray(image)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))


def several_images(rng: random.Random, shelf: Shelf) -> tuple[str, dict[str, Any], Messages]:
    stored = [shelf.image(rng) for _ in range(rng.choice((1, 2, 4)))]
    question = words(rng)
    turn = {"role": "user", "content": [*({"type": "image", "image": p} for _, p in stored), text(question)]}
    return "vqa", {"media": [uri for uri, _ in stored], "question": question}, [turn]


def text_only(rng: random.Random, shelf: Shelf) -> tuple[str, dict[str, Any], Messages]:
    question = words(rng)
    return "vqa", {"question": question}, [{"role": "user", "content": [text(question)]}]


def several_turns(rng: random.Random, shelf: Shelf) -> tuple[str, dict[str, Any], Messages]:
    """User image + text, assistant text, user image + text."""
    (first_uri, first), (second_uri, second) = shelf.image(rng), shelf.image(rng)
    ask, said, again = words(rng), words(rng), words(rng)

    def turns(first_image: dict[str, Any], second_image: dict[str, Any]) -> Messages:
        return [
            {"role": "user", "content": [first_image, text(ask)]},
            {"role": "assistant", "content": [text(said)]},
            {"role": "user", "content": [text(again), second_image]},
        ]

    ours = turns({"type": "image", "uri": first_uri}, {"type": "image", "uri": second_uri})
    return "vqa", {"messages": ours}, turns({"type": "image", "image": first}, {"type": "image", "image": second})


def continued_turn(rng: random.Random, shelf: Shelf) -> tuple[str, dict[str, Any], Messages]:
    """The last turn is the assistant's own: only new text comes back."""
    uri, pixels = shelf.image(rng)
    ask = words(rng)

    def turns(image: dict[str, Any]) -> Messages:
        return [
            {"role": "user", "content": [image, text(ask)]},
            {"role": "assistant", "content": [text("There's a pink flower")]},
        ]

    return "vqa", {"messages": turns({"type": "image", "uri": uri})}, turns({"type": "image", "image": pixels})


def two_clips(rng: random.Random, shelf: Shelf) -> tuple[str, dict[str, Any], Messages]:
    """Two clips of six frames in one prompt, the question after them."""
    clips = [shelf.clip(rng), shelf.clip(rng)]
    question = words(rng)
    frames = [{"type": "image", "image": frame} for _, sampled in clips for frame in sampled]
    options = {"media": [uri for uri, _ in clips], "question": question, "num_frames": NUM_FRAMES}
    return "video_qa", options, [{"role": "user", "content": [*frames, text(question)]}]


KINDS: list[Callable[[random.Random, Shelf], tuple[str, dict[str, Any], Messages]]] = [
    several_images,
    text_only,
    several_turns,
    continued_turn,
    several_images,
    two_clips,
]


@pytest.mark.parametrize(
    ("family", "kv"), [("idefics2", "slots"), ("idefics2", "paged"), ("llava", "paged"), ("idefics3", "slots")]
)
def test_24_concurrent_mixed_jobs_say_what_sequential_generation_says(
    family: str,
    kv: str,
    tiny_checkpoint: Callable[[str], Path],
    redis_server: RedisServer,
    s3_server: S3Server,
    s3_client: S3Client,
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint(family)
    rng = random.Random(11)
    shelf = Shelf(s3_client, tmp_path, family)
    asked = []
    for index in range(NUM_JOBS):
        task, options, messages = KINDS[index % len(KINDS)](rng, shelf)
        asked.append(Asked(task, options, messages, rng.choice((1, 3, rng.randint(8, 40)))))
    reference = Reference(checkpoint)
    expected = [reference.answer(job.messages, job.max_new_tokens) for job in asked]
    assert len(set(expected)) > NUM_JOBS // 2, "answers must depend on the prompt for this test to mean something"

    worker = WorkerProcess(
        tmp_path, redis_server.url, s3_server.url, model=checkpoint, model_name=family, max_num_seqs=8, kv=kv
    ).wait_ready()
    try:
        with Client(redis_server.url) as client, ThreadPoolExecutor(NUM_JOBS) as pool:
            texts = list(pool.map(lambda job: _through_the_queue(client, family, job), asked))
    finally:
        worker.kill()
    assert texts == expected


def _through_the_queue(client: Client, model: str, job: Asked) -> str:
    options = dict(job.options)
    media = options.pop("media", ())
    submit = client.video_qa if job.task == "video_qa" else client.vqa
    handle = submit(*media, model=model, max_new_tokens=job.max_new_tokens, **options)
    streamed = "".join(handle.stream(timeout=120))
    result = handle.result(timeout=120)
    assert streamed == result.text
    if job.task == "video_qa":
        assert result.usage.frames == 2 * NUM_FRAMES
    return result.text
