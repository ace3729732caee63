"""Families with native video behind the real queue: images, clips and both, as sequential `generate` answers them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from api_stub.client.client import Client
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server
from tests.tiny.families import picture
from tests.tiny.torchvision_families import VIDEO_FAMILIES
from worker.media.types import MediaPolicy
from worker.media.video import sample_clip

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_JOBS = 12
NUM_FRAMES = 4
FRAME_RATE = 10.0
MAX_NEW_TOKENS = 24
QUESTIONS = ("What moves?", "How many people are there?", "Describe the difference, please.")


@dataclass(frozen=True)
class Medium:
    """An object in S3 and what upstream is given of it."""

    uri: str
    part: dict[str, Any]
    metadata: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        return str(self.part["type"])


class Shelf:
    """Pictures and clips in S3."""

    def __init__(self, s3: S3Client, directory: Path) -> None:
        self._s3, self._directory = s3, directory

    def image(self, seed: int) -> Medium:
        """Store a lossless picture."""
        path = self._directory / f"{seed}.png"
        pixels = picture(seed, 32 + seed % 3 * 8, 48)
        pixels.save(path)
        return Medium(self._stored(path), {"type": "image", "image": pixels})

    def clip(self, seed: int) -> Medium:
        """Store a clip of 13 or 16 frames, of which every fourth or fifth is sampled."""
        path = self._directory / f"{seed}.avi"
        num_written = 13 + seed % 2 * 3
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FRAME_RATE, (48, 48))
        for number in range(num_written):
            writer.write(np.asarray(picture(1000 * seed + number)))
        writer.release()
        policy = MediaPolicy(buckets=frozenset({"media"}))
        frames: list[Image.Image] = list(sample_clip(path, NUM_FRAMES, policy, should_stop=lambda: None).frames)
        metadata = {
            "total_num_frames": num_written,
            "fps": FRAME_RATE,
            "duration": num_written / FRAME_RATE,
            "frames_indices": list(range(0, num_written, (num_written - 1) // (NUM_FRAMES - 1))),
        }
        return Medium(self._stored(path), {"type": "video", "video": frames}, metadata)

    def _stored(self, path: Path) -> str:
        self._s3.upload_file(str(path), "media", path.name)
        return f"s3://media/{path.name}"


class Reference:
    """A checkpoint run by transformers alone."""

    def __init__(self, checkpoint: Path) -> None:
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()

    def answer(self, content: list[dict[str, Any]], metadata: list[dict[str, Any]]) -> str:
        """Return what `generate` says to one user's turn."""
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"video_metadata": metadata, "do_sample_frames": False} if metadata else {},
        )
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        text: str = self._processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.lstrip()


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
    redis_server: RedisServer,
    s3_server: S3Server,
) -> Iterator[tuple[str, Path]]:
    """A family's name and checkpoint, with a worker that serves it under that name."""
    name, checkpoint = request.param, tiny_checkpoint(request.param)
    worker = WorkerProcess(
        tmp_path_factory.mktemp(name),
        redis_server.url,
        s3_server.url,
        model=checkpoint,
        model_name=name,
        max_num_seqs=6,
    ).wait_ready()
    yield name, checkpoint
    worker.kill()


def media_of(name: str, number: int, shelf: Shelf) -> list[Medium]:
    """Return a job's media: nothing, images, a clip, two clips, or both kinds where the family takes both."""
    kinds = ["", "i", "v", "ii", "vv", "iv"][number % 6]
    if name == "smolvlm":
        kinds = kinds.replace("iv", "v")
    return [(shelf.image if kind == "i" else shelf.clip)(10 * number + place) for place, kind in enumerate(kinds)]


def test_concurrent_jobs_with_images_and_clips_say_what_sequential_generation_says(
    served: tuple[str, Path], redis_server: RedisServer, s3_client: S3Client, tmp_path: Path
) -> None:
    name, checkpoint = served
    shelf, reference, chance = Shelf(s3_client, tmp_path), Reference(checkpoint), random.Random(5)
    jobs = [(media_of(name, number, shelf), chance.choice(QUESTIONS)) for number in range(NUM_JOBS)]
    expected = [
        reference.answer(
            [*(medium.part for medium in media), {"type": "text", "text": question}],
            [medium.metadata for medium in media if medium.metadata],
        )
        for media, question in jobs
    ]
    assert len(set(expected)) > NUM_JOBS // 2

    def ask(job: tuple[list[Medium], str]) -> str:
        media, question = job
        kinds = [medium.kind for medium in media]
        uris = [medium.uri for medium in media]
        options: dict[str, Any] = {"question": question, "model": name, "max_new_tokens": MAX_NEW_TOKENS}
        if "video" in kinds:
            handle = client.video_qa(*uris, num_frames=NUM_FRAMES, **options)
        else:
            handle = client.vqa(*uris, **options)
        streamed = "".join(handle.stream(timeout=60))
        result = handle.result(timeout=60)
        assert streamed == result.text
        assert (result.usage.images, result.usage.frames) == (kinds.count("image"), kinds.count("video") * NUM_FRAMES)
        return result.text

    with Client(redis_server.url) as client, ThreadPoolExecutor(NUM_JOBS) as pool:
        assert list(pool.map(ask, jobs)) == expected


def test_a_clip_may_stand_inside_the_text(
    served: tuple[str, Path], redis_server: RedisServer, s3_client: S3Client, tmp_path: Path
) -> None:
    name, checkpoint = served
    clip = Shelf(s3_client, tmp_path).clip(999)
    before, after = {"type": "text", "text": "In this clip,"}, {"type": "text", "text": "what is it that moves?"}
    assert clip.metadata is not None
    expected = Reference(checkpoint).answer([before, clip.part, after], [clip.metadata])
    named = {"type": "video", "uri": clip.uri, "num_frames": NUM_FRAMES}
    with Client(redis_server.url) as client:
        handle = client.video_qa(
            messages=[{"role": "user", "content": [before, named, after]}], model=name, max_new_tokens=MAX_NEW_TOKENS
        )
        result = handle.result(timeout=60)
    assert (result.text, result.usage.frames) == (expected, NUM_FRAMES)
