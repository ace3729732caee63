"""What a submit leaves in Redis, and what it says when something is wrong with the job, the id or Redis."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from api_stub.client.client import Client
from api_stub.contract import names
from api_stub.contract.job import MAX_JOB_BYTES, CaptionJob, TaskName, VqaJob, parse_job
from api_stub.contract.sampling import SamplingParams
from api_stub.errors import InvalidRequest, QueueFull, StoreUnavailable
from api_stub.settings import ClientSettings
from api_stub.submit import checked, checked_id, compose
from tests.servers import RedisServer, free_port

IMAGE = "s3://media/a.png"


def messages_in(client: redis.Redis, model: str = "default", priority: int = 6) -> list[dict[str, dict[str, object]]]:
    """The queue's messages, newest first."""
    raw = client.lrange(names.queue_list(model, names.priority_step(priority)), 0, -1)
    return [json.loads(message) for message in raw]


def stored_job(client: redis.Redis, job_id: str) -> object:
    body = client.hget(names.job_key(job_id), "body")
    assert body is not None
    return parse_job(body)


def test_a_submit_leaves_an_entry_and_a_doorbell_without_arguments(client: Client, redis_client: redis.Redis) -> None:
    job = client.caption(IMAGE, prompt="What is it?", job_id="job-1", priority=2)
    assert stored_job(redis_client, job.id) == CaptionJob(media=(IMAGE,), prompt="What is it?", priority=2).resolved(
        "job-1"
    )
    [message] = messages_in(redis_client, priority=2)
    headers, properties = message["headers"], message["properties"]
    assert headers["task"] == "visionq.caption"
    assert headers["id"] == properties["correlation_id"] == "job-1"
    assert headers[names.DOORBELL_HEADER] == 1
    assert properties["delivery_info"] == {"exchange": "", "routing_key": "visionq.default"}
    args, kwargs, _ = json.loads(base64.b64decode(str(message["body"])))
    assert (args, kwargs) == ([], {})


def test_each_model_has_its_own_queue_and_each_priority_its_list(client: Client, redis_client: redis.Redis) -> None:
    for priority in range(10):
        client.vqa(question="Why?", model="big.one", priority=priority)
    assert [len(messages_in(redis_client, "big.one", step)) for step in (0, 3, 6, 9)] == [3, 3, 3, 1]
    assert messages_in(redis_client) == []


def test_a_repeated_submit_is_the_same_job_with_one_doorbell(client: Client, redis_client: redis.Redis) -> None:
    for _ in range(2):
        client.vqa(question="Why?", job_id="job-1")
    assert redis_client.get(names.depth_key("default")) == "1"
    assert len(messages_in(redis_client)) == 1


def test_an_id_that_belongs_to_another_body_is_refused(client: Client) -> None:
    client.vqa(question="Why?", job_id="job-1")
    with pytest.raises(InvalidRequest, match="job-1"):
        client.vqa(question="Who?", job_id="job-1")


def test_a_full_queue_is_told_with_a_time_to_come_back(redis_url: str) -> None:
    settings = ClientSettings.model_validate({"redis_url": redis_url, "max_queued": 2})
    with Client(settings=settings) as client:
        for _ in range(2):
            client.vqa(question="Why?")
        with pytest.raises(QueueFull, match="the limit is 2") as refusal:
            client.vqa(question="Why?")
        assert refusal.value.retry_after_s > 0
        assert client.vqa(question="Why?", model="other").status().status == "queued"


def test_sampling_is_given_flat_or_as_a_whole() -> None:
    flat = compose(TaskName.VQA, (), {"question": "Why?"}, {"temperature": 0.5, "stop": ["a"], "seed": None})
    whole = compose(TaskName.VQA, (), {"question": "Why?"}, {"sampling": SamplingParams(temperature=0.5, stop=("a",))})
    mapped = compose(TaskName.VQA, (), {"question": "Why?"}, {"sampling": {"temperature": 0.5, "stop": ["a"]}})
    assert flat == whole == mapped
    with pytest.raises(InvalidRequest, match="sampling: given as `sampling` and as temperature"):
        compose(TaskName.VQA, (), {"question": "Why?"}, {"temperature": 0.5, "sampling": {"top_k": 3}})


def test_no_sampling_field_that_is_not_given_is_written() -> None:
    """What is written is said, and beats the checkpoint's generation config."""
    silent = compose(TaskName.VQA, (), {"question": "Why?"}, {"repetition_penalty": None, "stop": None})
    assert set(json.loads(silent.to_json())["sampling"]) == {"temperature", "top_p", "top_k", "min_p"}
    neutral = compose(
        TaskName.VQA, (), {"question": "Why?"}, {"repetition_penalty": 1.0, "min_new_tokens": 0, "stop": []}
    )
    assert (neutral.sampling.repetition_penalty, neutral.sampling.min_new_tokens, neutral.sampling.stop) == (1.0, 0, ())


def test_a_conversation_is_given_as_plain_dicts() -> None:
    turns = [{"role": "user", "content": [{"type": "image", "uri": IMAGE}, {"type": "text", "text": "Why?"}]}]
    job = compose(TaskName.VQA, (), {}, {"messages": turns})
    assert job.messages is not None
    assert compose(TaskName.VQA, (), {}, {"messages": job.messages}) == job


def test_a_local_path_is_refused_with_a_hint() -> None:
    with pytest.raises(InvalidRequest, match=r"\./cat\.jpg is no s3:// URI; upload a local file first"):
        compose(TaskName.CAPTION, ("./cat.jpg",), {}, {})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "visionq.vqa"}, "question: required"),
        ({"task": "visionq.vqa", "question": "Why?", "colour": "red"}, "colour: "),
        ({"task": "visionq.vqa", "question": "\ud83d"}, "cannot be written as JSON"),
        ({"task": "visionq.vqa", "question": "x" * MAX_JOB_BYTES}, f"the limit is {MAX_JOB_BYTES}"),
        (VqaJob(question="x" * MAX_JOB_BYTES), f"the limit is {MAX_JOB_BYTES}"),
    ],
)
def test_a_wrong_job_is_refused_before_anything_is_written(
    client: Client, redis_client: redis.Redis, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        client.submit(fields)
    assert redis_client.keys() == []


def test_an_option_that_does_not_exist_is_refused_by_name(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="temprature"):
        client.vqa(question="Why?", temprature=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("job_id", ["", " ", "a b", "a\n", "-a", "ä", "x" * 129])
def test_an_odd_job_id_is_refused(job_id: str) -> None:
    with pytest.raises(InvalidRequest, match="job_id"):
        checked_id(job_id)


def test_ids_are_new_when_none_is_given() -> None:
    assert checked_id("A1._:-z") == "A1._:-z"
    assert checked_id(None) != checked_id(None)
    assert checked(VqaJob(question="Why?")) == VqaJob(question="Why?")


def test_a_redis_that_is_down_is_unavailable_within_five_seconds() -> None:
    begin = time.monotonic()
    with Client(f"redis://127.0.0.1:{free_port()}/0") as client, pytest.raises(StoreUnavailable):
        client.vqa(question="Why?")
    assert time.monotonic() - begin < 5


@pytest.fixture
def silent_url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def test_a_redis_that_never_answers_is_unavailable_within_five_seconds(silent_url: str) -> None:
    begin = time.monotonic()
    with Client(silent_url) as client, pytest.raises(StoreUnavailable):
        client.vqa(question="Why?")
    assert time.monotonic() - begin < 5


def test_a_redis_without_memory_is_unavailable(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "1")
    try:
        with Client(server.url) as client, pytest.raises(StoreUnavailable, match="Redis refused: OOM"):
            client.vqa(question="Why?")
    finally:
        server.stop()
