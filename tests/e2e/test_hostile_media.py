"""A worker that is sent hostile media: each job ends with an answer or a code, the worker lives and answers on."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from api_stub.client.client import Client
from api_stub.errors import JobFailed
from tests.corpus.case import DECODED, Case
from tests.corpus.run import all_cases
from tests.corpus.traps import set_traps
from tests.processes import WorkerProcess, start_workers
from tests.servers import RedisServer, S3Server, eventually
from worker.media.sniff import MediaKind

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NUM_CASES = 40
#: What two pictures of the largest size take while they arrive, and as much again for the jobs that wait with theirs.
MAX_GROWTH_BYTES = 2 * 2 * 50_000_000 * 7


@pytest.mark.usefixtures("redis_url")  # no other test's jobs
def test_a_worker_survives_a_sample_of_the_corpus(
    redis_server: RedisServer, s3_server: S3Server, s3_client: S3Client, tmp_path: Path
) -> None:
    worker = start_workers(1, tmp_path, redis_server, s3_server, model="demo", decode_processes=2)[0]
    try:
        with set_traps(tmp_path) as traps, Client(redis_server.url) as client:
            s3_client.put_object(Bucket="media", Key="good.png", Body=good_picture())
            truth = caption(client)
            before = memory(worker.process.pid)
            cases = sample(all_cases(traps))
            outcomes = answered(client, s3_client, cases)
            assert not [
                (case.name, *outcome) for case, outcome in zip(cases, outcomes, strict=True)
                if outcome[0] not in case.outcomes
            ]  # fmt: skip
            assert {DECODED, "media_corrupt", "media_unsupported", "media_too_large"} <= {code for code, _ in outcomes}
            assert worker.process.poll() is None
            assert memory(worker.process.pid, "VmHWM") - before < MAX_GROWTH_BYTES
            assert caption(client) == truth
            assert (traps.num_connections, traps.num_openings) == (0, 0)
            for pid in decoders_of(worker):
                os.kill(pid, signal.SIGSEGV)
            assert caption(client, "good-again.png", s3_client) == truth
        decoders = decoders_of(worker)
        assert 1 <= len(decoders) <= 2
        assert worker.terminate() == 0
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in decoders), 20, "no decoder is left")
    finally:
        worker.kill()
    assert "Traceback" not in worker.text()


def sample(cases: list[Case]) -> list[Case]:
    """Every so many-th, and what asks for most."""
    largest = [case for case in cases if case.name in {"bomb-49-megapixels.png", "large-frames.mkv", "loop-index.mp4"}]
    return [*largest, *cases[:: len(cases) // (NUM_CASES - len(largest))]]


def answered(client: Client, storage: S3Client, cases: list[Case]) -> list[tuple[str, str]]:
    """Send all at once; return each one's code, or "decoded", and words."""
    jobs = []
    for case in cases:
        storage.put_object(Bucket="media", Key=f"hostile/{case.name}", Body=case.make())
        uri = f"s3://media/hostile/{case.name}"
        jobs.append(
            client.video_qa(uri, question="What moves?", max_new_tokens=8)
            if case.kind is MediaKind.VIDEO
            else client.caption(uri, max_new_tokens=8)
        )
    return [outcome_of(job) for job in jobs]


def outcome_of(job: object) -> tuple[str, str]:
    try:
        return DECODED, job.result(timeout=200).text  # type: ignore[attr-defined]
    except JobFailed as failure:
        return failure.code, failure.message


def caption(client: Client, key: str = "good.png", storage: S3Client | None = None) -> str:
    if storage is not None:
        storage.put_object(Bucket="media", Key=key, Body=good_picture())
    return client.caption(f"s3://media/{key}", max_new_tokens=16).result(timeout=100).text


def good_picture() -> bytes:
    file = io.BytesIO()
    picture = Image.new("RGB", (128, 128), (240, 240, 240))
    picture.paste((220, 40, 40), (30, 30, 90, 90))
    picture.save(file, "PNG")
    return file.getvalue()


def decoders_of(worker: WorkerProcess) -> list[int]:
    """The worker's children that decode."""
    pid = worker.process.pid
    children = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return [child for child in children if b"worker.media.decoder" in Path(f"/proc/{child}/cmdline").read_bytes()]


def memory(pid: int, what: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
