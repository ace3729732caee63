"""Chat completions and models through OpenAI's own package: both modes, images, errors, and clients that leave."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from api_stub.contract.error import ErrorCode
from api_stub.contract.media import S3Object
from api_stub.gateway.keys import digest_of, new_key
from api_stub.gateway.openai.api_docs import CHAT_EXAMPLE
from tests.gateway.openai_stack import eager_worker, in_background, openai_client
from tests.gateway.service import Service, serving
from tests.gateway.test_api_docs import check
from tests.gateway.test_submitting import job_of
from tests.servers import RedisServer, eventually
from tests.unit.api_stub.workers import ScriptedWorker

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PNG = b"\x89PNG\r\n\x1a\n not really"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
#: Fields that OpenAI's package does not know.
EXTRA = ("colour", "media_options", "mm_processor_kwargs")
HELLO: Any = [{"role": "user", "content": "Hello?"}]
KEYS = {name: new_key() for name in ("alice", "narrow")}
ENTRIES = f"alice:{digest_of(KEYS['alice'])}; narrow:{digest_of(KEYS['narrow'])} models=mine rate=6"


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai_client(service.url) as opened:
        yield opened


@pytest.fixture
def served(worker: ScriptedWorker) -> ScriptedWorker:
    """A worker that is known to serve `default`."""
    worker.ledger.beat("scripted@test:1", "default", [])
    return worker


@pytest.fixture
def hasty(redis_url: str) -> Iterator[Service]:
    """A gateway that keeps what its clients leave for a second."""
    with serving(redis_url, api_keep_abandoned_s=1.0) as running:
        yield running


def only_job(service: Service, status: str = "queued") -> str:
    """Wait for the one job of a status and return its id."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [job["job_id"] for job in service.http.get(f"/v1/jobs?status={status}").json()["jobs"]]
        return bool(found)

    eventually(look, 30, f"a job is {status}")
    (job_id,) = found
    return job_id


def test_a_question_is_answered_whole(service: Service, client: openai.OpenAI, redis_url: str) -> None:
    with eager_worker(redis_url):
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "system", "content": "Be short."}, *HELLO],
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            stop="END",
            n=1,
            user="somebody",
            metadata={"a": "b"},
        )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "you said Hello?",
        "stop",
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    job = job_of(service, answer.id.removeprefix("chatcmpl-"))
    assert job["task"] == "visionq.vqa"
    assert job["metadata"] == {"a": "b"}
    sampling = job["sampling"]
    assert isinstance(sampling, dict)
    assert sampling | {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["END"]} == sampling


def test_a_question_is_answered_in_pieces(client: openai.OpenAI, redis_url: str) -> None:
    with eager_worker(redis_url):
        stream = client.chat.completions.create(
            model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "you said Hello?"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert len({c.id for c in chunks}) == 1


def test_images_and_clips_are_stored_first_and_keep_their_places(
    service: Service, client: openai.OpenAI, s3_client: S3Client, redis_url: str
) -> None:
    content: Any = [
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
        {"type": "video_url", "video_url": {"url": "s3://media/clip.mp4", "num_frames": 4}},
        {"type": "text", "text": "What?"},
    ]
    with eager_worker(redis_url):
        answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": content}])
    job = job_of(service, answer.id.removeprefix("chatcmpl-"))
    assert job["task"] == "visionq.video_qa"
    (message,) = job["messages"]  # type: ignore[misc]
    image, video, text = message["content"]
    assert (video, text["text"]) == ({"type": "video", "uri": "s3://media/clip.mp4", "num_frames": 4}, "What?")
    target = S3Object.parse(image["uri"])
    assert s3_client.get_object(Bucket=target.bucket, Key=target.key)["Body"].read() == PNG


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"colour": "red"}, "colour"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b"}}]}
                ]
            },
            "messages.0.content.0.image_url.url",
        ),
        ({"messages": [*HELLO, {"role": "system", "content": "late"}]}, "messages.1"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"media_options": {"max_pixels": "9"}}, "media_options.max_pixels"),
        ({"media_options": {"min_pixels": 9, "max_pixels": 8}}, "media_options"),
        ({"mm_processor_kwargs": {"max_pixels": 9, "num_crops": 4}}, "mm_processor_kwargs.num_crops"),
        ({"mm_processor_kwargs": {}, "media_options": {}}, "mm_processor_kwargs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, served: ScriptedWorker, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            **{"model": "default", "messages": HELLO} | {k: v for k, v in fields.items() if k not in EXTRA},
            extra_body={k: v for k, v in fields.items() if k in EXTRA},
        )
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("name", ["media_options", "mm_processor_kwargs"])
def test_limits_for_pixels_reach_the_job_under_both_names(
    name: str, service: Service, client: openai.OpenAI, redis_url: str
) -> None:
    with eager_worker(redis_url):
        for asked in ({"max_pixels": 50_000}, {"min_pixels": 9, "max_pixels": 10}, {}):
            answer = client.chat.completions.create(model="default", messages=HELLO, extra_body={name: asked})
            assert job_of(service, answer.id.removeprefix("chatcmpl-")).get("media_options", {}) == asked


def test_fields_that_say_nothing_are_passed_over(service: Service, redis_url: str) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi", "name": "bob"}], "tools": [], "n": None}
    body |= {"response_format": {"type": "text"}, "store": True, "logprobs": False, "presence_penalty": 0}
    with eager_worker(redis_url):
        assert service.http.post("/v1/chat/completions", json=body).status_code == 200


def test_models_are_those_with_a_worker_and_others_do_not_exist(
    service: Service, client: openai.OpenAI, served: ScriptedWorker
) -> None:
    service.gateway.queues.forget()
    assert [model.id for model in client.models.list()] == ["default", "other"]  # the second one is listed
    assert client.models.retrieve("default").object == "model"
    for call in (
        lambda: client.models.retrieve("absent"),
        lambda: client.chat.completions.create(model="absent", messages=HELLO),
        lambda: client.chat.completions.create(model="GPT 4/o", messages=HELLO),
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            call()
        assert unknown.value.code == "model_not_found"


def test_keys_models_and_rates_hold_here_too(redis_server: RedisServer, redis_url: str) -> None:
    with (
        serving(redis_url, api_keys=ENTRIES, api_models="default,mine") as running,
        openai_client(running.url, "wrong") as stranger,
        openai_client(running.url, KEYS["narrow"]) as narrow,
    ):
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "unauthorized"
        assert [model.id for model in narrow.models.list()] == ["mine"]
        with pytest.raises(openai.NotFoundError):
            narrow.chat.completions.create(model="default", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as slow:
            [narrow.models.list() for _ in range(10)]
        assert slow.value.code == "rate_limited"
        assert int(slow.value.response.headers["Retry-After"]) >= 1


def test_a_full_queue_says_when_to_come_back(redis_url: str, worker: ScriptedWorker) -> None:
    with serving(redis_url, max_queued=1, api_models="default") as running, openai_client(running.url) as client:
        running.http.post("/v1/jobs", json={"task": "visionq.vqa", "question": "What?"})
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="default", messages=HELLO)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_job_that_fails_has_the_status_of_its_error(
    client: openai.OpenAI, service: Service, served: ScriptedWorker, is_stream: bool
) -> None:
    def fail() -> None:
        served.take(only_job(service))
        served.fail(ErrorCode.MEDIA_NOT_FOUND)

    thread = in_background(fail)
    with pytest.raises(openai.BadRequestError) as failed:
        client.chat.completions.create(model="default", messages=HELLO, stream=is_stream)
    assert failed.value.code == "media_not_found"
    thread.join(30)


@pytest.mark.parametrize(
    ("again", "is_same"), [(("a ", "red circle"), True), (("a ", "blue square"), False), (("x",), False)]
)
def test_a_second_attempt_goes_on_or_ends_the_stream(
    client: openai.OpenAI, service: Service, served: ScriptedWorker, again: tuple[str, ...], is_same: bool
) -> None:
    def start() -> None:
        served.take(only_job(service))
        served.say("a ", "red ")

    thread = in_background(start)
    chunks = iter(client.chat.completions.create(model="default", messages=HELLO, stream=True))
    texts: list[str] = []
    while "".join(texts) != "a red ":
        texts.append(next(chunks).choices[0].delta.content or "")
    thread.join(30)
    served.give_back()
    served.take(only_job(service))
    served.say(*again)
    if not is_same:
        with pytest.raises(openai.APIError, match="differs") as ended:
            list(chunks)
        assert ended.value.code == "stream_restarted"
        return
    served.finish()
    texts += [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "a red circle"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_client_that_leaves_cancels_its_job(
    hasty: Service, served: ScriptedWorker, is_stream: bool, is_running: bool
) -> None:
    service = hasty
    body = json.dumps({"model": "default", "messages": HELLO, "stream": is_stream}).encode()
    with socket.create_connection(service.address, timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        job_id = only_job(service)
        if is_running:
            served.take(job_id)
            served.say("a ")
            if is_stream:
                assert b"200 OK" in connection.recv(65536)

    def is_cancelled() -> bool:
        job = service.http.get(f"/v1/jobs/{job_id}").json()
        return bool(job.get("cancelling")) if is_running else job["status"] == "cancelled"

    eventually(is_cancelled, 30, "the job is cancelled")
    eventually(lambda: service.gateway.broadcaster.num_readers == 0, 30, "the reader is gone")


def test_the_document_says_what_is_sent(service: Service, redis_url: str) -> None:
    document = service.http.get("/openapi.json").json()
    check(document, "ChatRequest", CHAT_EXAMPLE)
    with eager_worker(redis_url):
        answer = service.http.post("/v1/chat/completions", json=CHAT_EXAMPLE)
        assert answer.status_code == 200, answer.text
        check(document, "ChatCompletion", answer.json())
        with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=CHAT_EXAMPLE | {"stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        check(document, "ChatChunk", json.loads(line))
    refused = service.http.post("/v1/chat/completions", json={})
    assert refused.status_code == 400
    check(document, "OpenAIErrorBody", refused.json())
