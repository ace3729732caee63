"""What a job may say, and what a producer is told about a job that says it wrongly."""

from __future__ import annotations

import hashlib
import json
import math
import re
from urllib.parse import unquote

import pytest

from api_stub.contract.error import InvalidJob
from api_stub.contract.event import JobCompleted, OutputDelta, body_fragment, parse_event
from api_stub.contract.job import MAX_JOB_BYTES, CaptionJob, TaskName, VqaJob, digest, parse_job
from api_stub.contract.media import S3Object
from api_stub.contract.names import is_model_name, model_of_queue, queue
from api_stub.contract.result import Usage
from api_stub.contract.status import CELERY_STATES, TRANSITIONS, JobStatus
from api_stub.contract.wire import MAX_DEPTH
from tests.golden.samples import EVENTS, JOB_ID

REFUSED = {
    "question: required": {"task": "visionq.vqa"},
    "media: a caption needs at least 1 image, got 0": {"task": "visionq.caption"},
    "media: a video question needs at least 1 video, got 0": {"task": "visionq.video_qa", "question": "Why?"},
    "colour": {"task": "visionq.vqa", "question": "Why?", "colour": "red"},
    "media must be an s3:// URI, got http://…": {"task": "visionq.vqa", "question": "Why?", "media": ["http://host/a.png"]},
    "priority": {"task": "visionq.vqa", "question": "Why?", "priority": 10},
    "metadata: 5008 bytes of JSON, the limit is 4096": {
        "task": "visionq.vqa", "question": "Why?", "metadata": {"a": "x" * 5000}
    },
    "question: not beside messages": {
        "task": "visionq.vqa", "question": "Why?",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    },
    "messages: at least one user turn": {
        "task": "visionq.vqa", "messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}]
    },
    "sampling.min_new_tokens: above max_new_tokens": {
        "task": "visionq.vqa", "question": "Why?", "sampling": {"max_new_tokens": 2, "min_new_tokens": 3}
    },
    "half a surrogate pair": {"task": "visionq.vqa", "question": "\ud83d"},
    "messages: not for captions; use vqa": {
        "task": "visionq.caption",
        "messages": [{"role": "user", "content": [{"type": "image", "uri": "s3://media/a.png"}]}],
    },
    "sampling.repetition_penalty": {
        "task": "visionq.vqa", "question": "Why?", "sampling": {"repetition_penalty": 1e-40}
    },
    "media_options: min_pixels: 9 is above max_pixels, 8": {
        "task": "visionq.vqa", "question": "Why?", "media_options": {"min_pixels": 9, "max_pixels": 8}
    },
    "media_options.max_pixels: Input should be greater than or equal to 1 (got 0)": {
        "task": "visionq.vqa", "question": "Why?", "media_options": {"max_pixels": 0}
    },
    "media_options.min_pixels: Input should be less than or equal to 268435456 (got 268435457)": {
        "task": "visionq.vqa", "question": "Why?", "media_options": {"min_pixels": 2**28 + 1}
    },
    "media_options.size: ": {"task": "visionq.vqa", "question": "Why?", "media_options": {"size": 1}},
    "deadline_s: cannot be written as JSON": {"task": "visionq.vqa", "question": "Why?", "deadline_s": math.nan},
    "sampling.seed: cannot be written as JSON": {
        "task": "visionq.vqa", "question": "Why?", "sampling": {"seed": math.inf}
    },
    "metadata.b: cannot be written as JSON": {"task": "visionq.vqa", "question": "Why?", "metadata": {"b": {1, 2}}},
    "control characters": {"task": "visionq.caption", "media": ["s3://media/a\nb"]},
    "only ?versionId=…": {"task": "visionq.caption", "media": ["s3://media/a?"]},
    "a '#' in an S3 key": {"task": "visionq.caption", "media": ["s3://media/a#"]},
    "no JSON form": {"task": "visionq.vqa", "question": "Why?", "metadata": {"a": object()}},
}  # fmt: skip


def test_a_refusal_is_short_however_long_the_names_of_the_fields() -> None:
    with pytest.raises(InvalidJob) as refused:
        parse_job({"question": "Why?", "x" * 10_000: 1}, TaskName.VQA)
    assert len(str(refused.value)) < 200


def test_what_stands_behind_a_refusal_repeats_no_input() -> None:
    with pytest.raises(InvalidJob) as refused:
        parse_job({"question": "Why?", "webhook": {"url": "https://user:hunter2@host/"}, "priority": 99}, TaskName.VQA)
    assert "hunter2" not in str(refused.value.__cause__)
    assert "99" not in str(refused.value.__cause__)


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_job_is_refused_with_the_field_and_the_limit(words: str) -> None:
    with pytest.raises(InvalidJob) as refusal:
        parse_job(REFUSED[words])
    expected = {"half a surrogate pair": "cannot be written as JSON", "no JSON form": "cannot be written as JSON"}
    assert expected.get(words, words) in str(refusal.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"media": ["https://b.s3.host/k?AWSAccessKeyId=SECRET&Signature=SECRET"]},
        {"media": "https://b.s3.host/k?Signature=SECRET"},
        {"media": ["s3://KEYID:SECRET@media/x"]},
        {"media": ["s3://media/x?Signature=SECRET"]},
        {"media": ["s3://media/x#SECRET"]},
        {"webhook": {"url": "https://host/", "secret": "SECRET"}},
        {"webhook": {"url": "SECRET"}},
        {"webhook": "SECRET"},
        {"metadata": "SECRET"},
        {"api_key": "SECRET"},
        {"priority": {"key": "SECRET"}},
    ],
)
def test_a_refusal_repeats_no_credential_and_no_signed_url(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidJob) as refusal:
        parse_job({"task": "visionq.vqa", "question": "Why?"} | fields)
    assert "SECRET" not in str(refusal.value)
    assert next(iter(fields)) in str(refusal.value)


def test_a_refusal_repeats_the_number_that_is_out_of_bounds() -> None:
    with pytest.raises(InvalidJob, match=r"priority: .* \(got 10\)"):
        parse_job({"task": "visionq.vqa", "question": "Why?", "priority": 10})


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["deadline_s", "priority", "metadata"])
def test_a_number_that_json_does_not_know_is_refused_in_raw_text_too(field: str, literal: str) -> None:
    value = f'{{"a": {literal}}}' if field == "metadata" else literal
    with pytest.raises(InvalidJob, match=field):
        parse_job(f'{{"task": "visionq.vqa", "question": "Why?", "{field}": {value}}}')


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("priority", "true"), ("priority", '"5"'), ("priority", "5.5"), ("deadline_s", "true"), ("deadline_s", '"5"'),
        ("sampling.seed", "true"), ("sampling.top_k", '"1"'), ("sampling.temperature", '"0.5"'), ("question", "5"),
        ("media_options.max_pixels", "true"), ("media_options.max_pixels", '"5"'), ("media_options.max_pixels", "5.5"),
        ("media_options", "5"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(place: str, value: str) -> None:
    outer, _, inner = place.partition(".")
    fields = f'"{outer}": {{"{inner}": {value}}}' if inner else f'"{outer}": {value}'
    question = "" if place == "question" else '"question": "Why?", '
    with pytest.raises(InvalidJob, match=f"^{place}: "):
        parse_job(f'{{"task": "visionq.vqa", {question}{fields}}}')


def test_an_integer_may_be_written_with_a_point() -> None:
    job = parse_job('{"task": "visionq.vqa", "question": "Why?", "priority": 5.0, "sampling": {"top_k": 1e3}}')
    assert (job.priority, job.sampling.top_k) == (5, 1000)


@pytest.mark.parametrize(
    "raw", [b"\xff", "{", "[]", "null", '"text"', "\ud83d", '{"task":"visionq.vqa","question":"\\ud83d"}']
)
def test_what_is_no_json_object_is_no_job(raw: str | bytes) -> None:
    with pytest.raises(InvalidJob):
        parse_job(raw)


def test_a_job_of_the_limit_is_read_and_one_byte_more_is_not() -> None:
    empty = len(json.dumps({"task": "visionq.vqa", "question": ""}, separators=(",", ":")))
    fits = {"task": "visionq.vqa", "question": "x" * (MAX_JOB_BYTES - empty)}
    assert isinstance(parse_job(fits), VqaJob)
    with pytest.raises(InvalidJob, match=rf"{MAX_JOB_BYTES + 1} bytes of JSON, the limit is {MAX_JOB_BYTES}"):
        parse_job(fits | {"question": fits["question"] + "x"})


def test_media_options_that_ask_nothing_leave_a_job_as_it_was() -> None:
    plain = parse_job({"task": "visionq.vqa", "question": "Why?"})
    for nothing in (None, {}, {"min_pixels": None}):
        job = parse_job({"task": "visionq.vqa", "question": "Why?", "media_options": nothing})
        assert (job.to_json(), digest(job)) == (plain.to_json(), digest(plain))
    assert "media_options" not in plain.to_json()
    asked = parse_job('{"task": "visionq.vqa", "question": "Why?", "media_options": {"max_pixels": 1e3}}')
    assert '"media_options":{"max_pixels":1000}' in asked.to_json()
    assert digest(asked) != digest(plain)


def test_the_task_of_a_celery_message_completes_its_fields() -> None:
    assert isinstance(parse_job({"media": ["s3://media/a.png"]}, TaskName.CAPTION), CaptionJob)


def test_resolving_fills_in_the_same_seed_for_the_same_id_only() -> None:
    job = VqaJob(question="Why?")
    assert job.resolved(JOB_ID) == job.resolved(JOB_ID)
    assert job.resolved(JOB_ID).sampling.seed != job.resolved("another").sampling.seed
    assert job.resolved(JOB_ID).sampling.max_new_tokens == 256
    assert CaptionJob(media=("s3://media/a.png",)).resolved(JOB_ID).sampling.max_new_tokens == 64


def test_spelling_of_a_media_uri_does_not_change_the_digest() -> None:
    spellings = ("s3://media/a b.png", "s3://media/a%20b.png")
    jobs = {digest(parse_job({"task": "visionq.caption", "media": [uri]})) for uri in spellings}
    assert len(jobs) == 1


#: What the release before checkpoint defaults wrote, and hashed, for a job that says nothing of its sampling.
EARLIER_JSON = (
    '{"model":"default","media":[],"sampling":{"min_new_tokens":0,"temperature":0.0,"top_p":1.0,"top_k":0,"min_p":0.0,'
    '"repetition_penalty":1.0,"stop":[]},"priority":6,"tenant":"","task":"visionq.vqa","question":"Why?"}'
)
NEUTRAL_VALUES: dict[str, object] = {"min_new_tokens": 0, "repetition_penalty": 1.0, "stop": []}


def test_a_job_that_says_nothing_of_its_sampling_has_the_digest_it_had() -> None:
    job = VqaJob(question="Why?")
    assert digest(job) == hashlib.sha256(EARLIER_JSON.encode()).hexdigest()
    assert set(json.loads(job.to_json())["sampling"]).isdisjoint(NEUTRAL_VALUES)
    resolved = job.resolved(JOB_ID)
    assert parse_job(resolved.to_json()) == resolved


@pytest.mark.parametrize("field", NEUTRAL_VALUES)
def test_a_neutral_value_that_is_given_is_kept_apart_from_an_absent_one(field: str) -> None:
    fields = {"task": "visionq.vqa", "question": "Why?"}
    job = parse_job(fields | {"sampling": {field: NEUTRAL_VALUES[field]}})
    assert json.loads(job.to_json())["sampling"][field] == NEUTRAL_VALUES[field]
    assert parse_job(job.to_json()) == job
    assert job != parse_job(fields)
    assert digest(job) != digest(parse_job(fields))
    assert parse_job(fields | {"sampling": {field: None}}) == parse_job(fields)


def test_json_of_earlier_producers_means_what_it_says() -> None:
    sampling = parse_job(EARLIER_JSON).sampling
    assert (sampling.min_new_tokens, sampling.repetition_penalty, sampling.stop) == (0, 1.0, ())
    assert parse_job(EARLIER_JSON).to_json() == EARLIER_JSON


@pytest.mark.parametrize("key", ["a b/ü%?#&=+.png", "a..b/...", "a//b", "/a", "\u2028", "%41"])
def test_a_key_survives_the_trip_through_its_uri(key: str) -> None:
    assert S3Object.parse(S3Object("media", key, "v 1").uri) == S3Object("media", key, "v 1")


@pytest.mark.parametrize(
    ("path", "segment"),
    [("a/../b", ".."), ("..", ".."), ("a/%2E%2e/b", ".."), ("a%2F..%2Fb", ".."), ("./a", "."), ("a/.", ".")],
)
def test_a_key_does_not_climb(path: str, segment: str) -> None:
    uri = f"s3://media/{path}"
    parts = [{"type": "image", "uri": uri}, {"type": "text", "text": "Why?"}]
    for fields, field in (
        ({"task": "visionq.caption", "media": ["s3://media/a.png", uri]}, "media.1"),
        ({"task": "visionq.vqa", "messages": [{"role": "user", "content": parts}]}, "messages.0.content.0"),
    ):
        with pytest.raises(InvalidJob, match=re.escape(f"no segment '{segment}', got '{unquote(path)}'")) as caught:
            parse_job(fields)
        assert str(caught.value).startswith(field)


@pytest.mark.parametrize("name", EVENTS)
def test_a_body_is_its_event_without_the_envelope(name: str) -> None:
    event = EVENTS[name]
    if not isinstance(event, OutputDelta | JobCompleted):
        return
    body_type = type(event).__mro__[1]
    body = body_type(**{field: getattr(event, field) for field in body_type.model_fields})
    envelope = {"v": 1, "job_id": event.job_id, "seq": event.seq, "attempt": event.attempt, "ts": event.ts}
    stamped = json.dumps(envelope)[:-1] + "," + body_fragment(body) + "}"
    assert parse_event(stamped) == event


def test_final_states_have_no_way_out_and_a_celery_state() -> None:
    final = {status for status in JobStatus if status.is_final}
    assert final == set(CELERY_STATES) == {s for s, targets in TRANSITIONS.items() if not targets}
    assert set(TRANSITIONS) == set(JobStatus)


def test_a_model_name_routes_and_nothing_else_does() -> None:
    assert model_of_queue(queue("smolvlm-2.2b")) == "smolvlm-2.2b"
    for name in ("", "Default", "-a", "a b", "default\n", "ä", "x" * 64):
        assert not is_model_name(name)
    with pytest.raises(ValueError, match="not a visionq queue"):
        model_of_queue("celery")


def test_metadata_is_nested_no_deeper_than_readers_of_views_can_follow() -> None:
    def nested(depth: int) -> dict[str, object]:
        value: dict[str, object] = json.loads('{"a":' * depth + "1" + "}" * depth)
        return value

    metadata = nested(MAX_DEPTH)
    job = parse_job({"question": "hello", "metadata": metadata}, TaskName.VQA)
    completed = next(event for event in EVENTS.values() if isinstance(event, JobCompleted))
    result = completed.result.model_copy(update={"metadata": job.metadata})
    event = parse_event(completed.model_copy(update={"result": result}).to_json())
    assert isinstance(event, JobCompleted)
    assert event.result.metadata == metadata
    for fields in ({"metadata": nested(MAX_DEPTH + 1)}, {"colour": nested(700)}):
        with pytest.raises(InvalidJob, match=rf"^{next(iter(fields))}: nested \d+ deep, the limit is {MAX_DEPTH}"):
            parse_job({"question": "hello"} | fields, TaskName.VQA)
    with pytest.raises(InvalidJob, match="metadata: nested 129 deep"):
        parse_job(json.dumps({"question": "hello", "task": "visionq.vqa", "metadata": nested(MAX_DEPTH + 1)}))


def test_a_result_prints_what_it_holds_and_no_absent_values() -> None:
    assert str(Usage(prompt_tokens=3)) == "prompt_tokens=3 completion_tokens=0 images=0 frames=0"
    assert str(Usage(media_tokens=2)).endswith("media_tokens=2")
