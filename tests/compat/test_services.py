"""Clients and gateways of both releases, in every pairing, before a worker of this one."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import httpx
import pytest

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.errors import JobFailed
from tests.compat.earlier import WHEEL, Earlier, environment
from tests.e2e.conftest import demo_worker
from tests.e2e.scenes import Question, stored_questions
from tests.gateway.service import serving
from tests.processes import WorkerProcess
from tests.servers import RedisServer, S3Server, eventually, free_port

pytestmark = pytest.mark.check

__all__ = ["demo_worker"]

#: Nobody serves it.
UNSERVED = "nobody"
S3_ACCESS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}


class Way(Protocol):
    """A client of one release, to Redis or to a gateway of either."""

    def submit(self, fields: dict[str, Any], job_id: str) -> None:
        """Hand a job in."""

    def cancel(self, job_id: str) -> str:
        """Ask for a job's end."""

    def retry(self, job_id: str) -> str:
        """Queue the job again; the new id."""

    def text(self, job_id: str) -> str:
        """The stream's text."""

    def events(self, job_id: str) -> list[Any]:
        """All events, as JSON."""

    def result(self, job_id: str) -> Any:
        """The result as JSON, or the code of the error."""

    def status(self, job_id: str) -> Any:
        """The view as JSON."""


class OurWay:
    """A client of this release."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def submit(self, fields: dict[str, Any], job_id: str) -> None:
        self._client.submit(fields, job_id)

    def cancel(self, job_id: str) -> str:
        return self._client.job(job_id).cancel().value

    def retry(self, job_id: str) -> str:
        return self._client.retry(job_id).id

    def text(self, job_id: str) -> str:
        return "".join(self._client.job(job_id).stream(timeout=30))

    def events(self, job_id: str) -> list[Any]:
        return [json.loads(event.to_json()) for event in self._client.job(job_id).events(timeout=30)]

    def result(self, job_id: str) -> Any:
        try:
            return json.loads(self._client.job(job_id).result(timeout=30).to_json())
        except JobFailed as error:
            return error.code

    def status(self, job_id: str) -> Any:
        return json.loads(self._client.job(job_id).status().to_json())


class EarlierWay:
    """A client of the last release."""

    def __init__(self, process: Earlier, url: str) -> None:
        self._process, self._name = process, f"client_{uuid.uuid4().hex}"
        process(f"{self._name} = Client(url); answer = None", url=url)

    def _run(self, code: str, **given: object) -> Any:
        return self._process(code.replace("CLIENT", self._name), **given)

    def submit(self, fields: dict[str, Any], job_id: str) -> None:
        self._run("CLIENT.submit(fields, job_id).id", fields=fields, job_id=job_id)

    def cancel(self, job_id: str) -> str:
        return str(self._run("CLIENT.job(job_id).cancel().value", job_id=job_id))

    def retry(self, job_id: str) -> str:
        return str(self._run("CLIENT.retry(job_id).id", job_id=job_id))

    def text(self, job_id: str) -> str:
        return str(self._run('"".join(CLIENT.job(job_id).stream(timeout=30))', job_id=job_id))

    def events(self, job_id: str) -> list[Any]:
        return list(self._run("[each for each in CLIENT.job(job_id).events(timeout=30)]", job_id=job_id))

    def result(self, job_id: str) -> Any:
        code = """
            from api_stub.errors import JobFailed
            try:
                answer = CLIENT.job(job_id).result(timeout=30)
            except JobFailed as error:
                answer = error.code
        """
        return self._run(code, job_id=job_id)

    def status(self, job_id: str) -> Any:
        return self._run("CLIENT.job(job_id).status()", job_id=job_id)


@pytest.fixture(scope="module")
def earlier_gateway(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, s3_server: S3Server
) -> Iterator[str]:
    """A gateway of the last release and its reaper, started outside this checkout."""
    folder, url = tmp_path_factory.mktemp("gateway"), f"http://127.0.0.1:{(port := free_port())}"
    with zipfile.ZipFile(WHEEL) as packed:  # its page is served from a folder
        packed.extractall(folder)
    variables = {
        "PYTHONPATH": str(folder), "VISIONQ_REDIS_URL": redis_server.url, "VISIONQ_API_PORT": str(port),
        "VISIONQ_API_MODELS": UNSERVED,
        "VISIONQ_LEASE_S": "6", "VISIONQ_GRACE_S": "2", "AWS_ENDPOINT_URL_S3": s3_server.url,
    }  # fmt: skip
    command = [sys.executable, "-c", "from api_stub.cli import main; main()", "api"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment(**variables, **S3_ACCESS), cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    eventually(lambda: process.poll() is not None or _answers(url), 30, "the gateway listens")
    assert process.poll() is None, (folder / "log").read_text()
    assert "media_options" not in httpx.get(f"{url}/openapi.json").text  # a field of this release
    yield url
    process.terminate()
    process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def ways(
    process: Earlier, earlier_gateway: str, redis_server: RedisServer, s3_server: S3Server, demo_worker: WorkerProcess
) -> Iterator[dict[str, Way]]:
    """Both releases' clients to Redis and to both releases' gateways, some of which have handed a job in before.

    A process of the last release that only reads cannot be noticed: docs/operate.md says to replace it before workers.
    """
    s3_server.client()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in S3_ACCESS.items():
            patch.setenv(name, value)
        gateway = stack.enter_context(serving(redis_server.url, s3_server.url, api_models=f"default,{UNSERVED}")).url
        addresses = {"redis": redis_server.url, "our gateway": gateway, "their gateway": earlier_gateway}
        made: dict[str, Way] = {}
        for name, url in addresses.items():
            made[f"ours to {name}"] = OurWay(stack.enter_context(Client(url)))
            made[f"theirs to {name}"] = EarlierWay(process, url)
        made["theirs to redis"].submit({"task": "visionq.vqa", "question": "hello"}, str(uuid.uuid4()))
        with redis_server.client() as raw:
            eventually(lambda: raw.hexists(names.WATCH_KEY, "older"), 30.0, "the last release is noticed")
        yield made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> list[Question]:
    """One question about each of a few drawn scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    questions = stored_questions(s3_server.client(), folder, "--count", "6", "--seed", "7")
    return list({question.uri: question for question in questions}.values())


WAYS = [f"{whose} to {what}" for what in ("redis", "our gateway", "their gateway") for whose in ("ours", "theirs")]


def jobs(pictures: list[Question], index: int) -> list[dict[str, Any]]:
    """One job of every kind that the last release knows and a model of pictures takes."""
    picture = pictures[index % len(pictures)]
    image = {"type": "image", "uri": picture.uri}
    turns = [{"role": "user", "content": [image, {"type": "text", "text": picture.text}]}]
    return [
        {"task": "visionq.caption", "media": [picture.uri]},
        {"task": "visionq.vqa", "media": [picture.uri], "question": picture.text, "metadata": {"of": picture.answer}},
        {"task": "visionq.vqa", "messages": turns, "sampling": {"max_new_tokens": 8, "stop": ["zzz"]}, "priority": 0},
        {"task": "visionq.vqa", "question": "hello", "sampling": {"temperature": 1.0, "seed": 5, "max_new_tokens": 4}},
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_job_handed_in_on_any_way_is_answered_alike_on_every_way(
    ways: dict[str, Way], pictures: list[Question], way: str
) -> None:
    for fields in jobs(pictures, WAYS.index(way)):
        job_id = str(uuid.uuid4())
        ways[way].submit(fields, job_id)
        result = ways[way].result(job_id)
        assert isinstance(result, dict), result
        events = ways[way].events(job_id)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["type"] == "job.completed"
        assert events[-1]["result"] == result
        for name, other in ways.items():
            assert other.text(job_id) == result["text"], name
            assert other.result(job_id) == result, name
            assert other.events(job_id) == events, name
            assert other.status(job_id) == ways[way].status(job_id), name
            other.submit(fields, job_id)  # the same job on every way, not a conflict


@pytest.mark.parametrize("way", WAYS)
def test_a_job_is_answered_alike_whoever_hands_it_in(ways: dict[str, Way], pictures: list[Question], way: str) -> None:
    for fields in jobs(pictures, 0)[:3]:
        texts = []
        for producer in (way, "ours to redis"):
            job_id = str(uuid.uuid4())
            ways[producer].submit(fields, job_id)
            texts.append(ways[producer].text(job_id))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("way", WAYS)
def test_every_end_that_is_no_result_is_told_alike_on_every_way(ways: dict[str, Way], way: str) -> None:
    cancelled, missing = str(uuid.uuid4()), str(uuid.uuid4())
    ways[way].submit({"task": "visionq.vqa", "question": "Why?", "model": UNSERVED}, cancelled)
    assert [other.status(cancelled)["status"] for other in ways.values()] == ["queued"] * len(ways)
    assert ways[way].cancel(cancelled) == "cancelled"
    ways[way].submit({"task": "visionq.caption", "media": ["s3://media/none.png"]}, missing)
    assert ways[way].result(missing) == "media_not_found"
    again = ways[way].retry(cancelled)
    for name, other in ways.items():
        assert other.result(cancelled) == "cancelled", name
        assert other.result(missing) == "media_not_found", name
        for job_id in (cancelled, missing):
            assert other.events(job_id) == ways[way].events(job_id), name
        assert other.retry(cancelled) == again, name
    assert ways[way].cancel(again) == "cancelled"


@pytest.mark.parametrize("way", WAYS)
def test_a_running_job_is_cancelled_on_any_way(ways: dict[str, Way], way: str) -> None:
    job_id = str(uuid.uuid4())
    long = {"max_new_tokens": 2000, "min_new_tokens": 2000, "temperature": 2.0}
    ways["ours to redis"].submit({"task": "visionq.vqa", "question": "hello", "sampling": long}, job_id)
    eventually(lambda: ways["ours to redis"].status(job_id)["status"] != "queued", 20, "it runs")
    assert ways[way].cancel(job_id) == "cancelling"
    assert [other.result(job_id) for other in ways.values()] == ["cancelled"] * len(ways)
