"""Captioners without a chat template behind the real queue: captions as `generate` makes them, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from api_stub.client.client import Client
from api_stub.errors import JobFailed
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server
from tests.tiny.families import picture, picture_png
from worker.demo_model import CAPTIONER
from worker.demo_model.draw import write_picture
from worker.demo_model.learning.captioner.evaluate import Captioner, held_out
from worker.demo_model.questions import caption
from worker.demo_model.scenes import draw

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_JOBS = 12
BEGINNING = "a photo of"


# PaliGemma's processor makes labels in a way NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=["git", "blip2", "paligemma"])
def captioner(
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
        max_num_seqs=4,
    ).wait_ready()
    yield name, checkpoint
    worker.kill()


def upstream(name: str, processor: Any, image: Image.Image, beginning: str | None) -> dict[str, Any]:
    """Return what the family's model card gives to `generate`: pixels alone without a beginning where it can."""
    if name == "paligemma":
        encoded = processor(images=image, text=f"<image>{beginning or 'caption en'}", return_tensors="pt")
        return {key: value for key, value in encoded.items() if key != "labels"}
    if beginning is None or name == "git":
        inputs = dict(processor(images=image, return_tensors="pt"))
        if beginning is not None:
            words = processor.tokenizer(beginning, add_special_tokens=False).input_ids
            inputs["input_ids"] = torch.tensor([[processor.tokenizer.bos_token_id, *words]])
        return inputs
    return dict(processor(images=image, text=beginning, return_tensors="pt"))


def expected_captions(name: str, checkpoint: Path) -> list[str]:
    """Return what `generate` alone says: without a beginning for even jobs, with one for odd ones."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    captions = []
    for seed in range(NUM_JOBS):
        inputs = upstream(name, processor, picture(seed), BEGINNING if seed % 2 else None)
        # Of pixels alone, GIT returns its start token with the answer, BLIP-2 the answer only.
        num_prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else int(name == "git")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, num_prompt:]
        captions.append(processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip())
    return captions


def test_concurrent_captions_say_what_sequential_generation_says(
    captioner: tuple[str, Path], redis_server: RedisServer, s3_client: S3Client
) -> None:
    name, checkpoint = captioner
    for seed in range(NUM_JOBS):
        s3_client.put_object(Bucket="media", Key=f"{name}-{seed}.png", Body=picture_png(seed))
    expected = expected_captions(name, checkpoint)
    assert len(set(expected)) > NUM_JOBS // 2

    def caption(seed: int) -> str:
        prompt = BEGINNING if seed % 2 else None
        handle = client.caption(f"s3://media/{name}-{seed}.png", prompt=prompt, model=name, max_new_tokens=20)
        streamed = "".join(handle.stream(timeout=60))
        result = handle.result(timeout=60)
        assert streamed == result.text
        assert (result.usage.images, result.usage.frames) == (1, 0)
        return result.text

    with Client(redis_server.url) as client, ThreadPoolExecutor(NUM_JOBS) as pool:
        assert list(pool.map(caption, range(NUM_JOBS))) == expected


def test_what_a_family_has_no_form_for_is_refused_by_name(
    captioner: tuple[str, Path], redis_server: RedisServer
) -> None:
    """None of the objects exists: what cannot be served is refused before anything is fetched."""
    name, _ = captioner
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with Client(redis_server.url) as client:
        refused = {
            client.video_qa("s3://media/a.mp4", question="What?", model=name): "takes images only",
            client.vqa(messages=talk, model=name): "has no chat template",
        }
        if name == "paligemma":
            refused[client.vqa(question="What?", model=name)] = "takes at least 1 image, got 0"
        else:
            refused[client.vqa("s3://media/a.png", question="What?", model=name)] = "answers no questions"
            refused[client.caption("s3://media/a.png", "s3://media/b.png", model=name)] = "exactly 1 image, got 2"
        for handle, why in refused.items():
            with pytest.raises(JobFailed, match=why) as failure:
                handle.result(timeout=60)
            assert failure.value.code == "invalid_request"


def test_the_shipped_captioner_describes_drawings_through_the_queue(
    tmp_path: Path, redis_server: RedisServer, s3_server: S3Server, s3_client: S3Client
) -> None:
    scenes = held_out(10, seed=8)
    for number, scene in enumerate(scenes):
        write_picture(tmp_path / f"{number}.png", scene)
        s3_client.upload_file(str(tmp_path / f"{number}.png"), "media", f"shipped/{number}.png")
    worker = WorkerProcess(
        tmp_path, redis_server.url, s3_server.url, model="demo-captioner", model_name="captioner", max_num_seqs=4
    ).wait_ready()

    with Client(redis_server.url) as client:
        handles = [client.caption(f"s3://media/shipped/{n}.png", model="captioner") for n in range(len(scenes))]
        said = [handle.result(timeout=60).text for handle in handles]
    worker.kill()

    assert said == Captioner.load(CAPTIONER).describe([draw(scene) for scene in scenes])
    assert sum(text == caption(scene) for text, scene in zip(said, scenes, strict=True)) >= 8
