"""What a request to submit may look like, and how a wrong one is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from typing import TYPE_CHECKING

import httpx
import pytest

from api_stub.contract.media import S3Object
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import QUESTION
from tests.servers import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PNG = b"\x89PNG\r\n\x1a\n not really"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def post(service: Service, body: object, **headers: str) -> httpx.Response:
    return service.http.post("/v1/jobs", json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})


def job_of(service: Service, job_id: str) -> dict[str, object]:
    """The job as a worker finds it."""
    import redis

    url = service.gateway.settings.redis_url.get_secret_value()
    with redis.Redis.from_url(url, decode_responses=True) as client:
        body = client.hget(f"visionq:job:{job_id}", "body")
    found: dict[str, object] = json.loads(str(body))
    return found


def stored(s3_client: S3Client, uri: str) -> tuple[bytes, str]:
    target = S3Object.parse(uri)
    answer = s3_client.get_object(Bucket=target.bucket, Key=target.key)
    return answer["Body"].read(), answer["ContentType"]


def uploads(s3_client: S3Client) -> set[str]:
    listed = s3_client.list_objects_v2(Bucket="media", Prefix="uploads/").get("Contents", [])
    return {entry["Key"] for entry in listed}


def test_the_same_key_and_body_is_the_same_job(service: Service) -> None:
    bodies = [QUESTION, dict(reversed(QUESTION.items()))]
    first, second = (post(service, body, Idempotency_Key="k-1") for body in bodies)
    assert first.json()["job_id"] == second.json()["job_id"]
    assert post(service, QUESTION, Idempotency_Key="k-2").json()["job_id"] != first.json()["job_id"]
    other = post(service, QUESTION | {"question": "What else?"}, Idempotency_Key="k-1")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_the_same_key_and_inline_media_is_the_same_job(service: Service, s3_client: S3Client) -> None:
    body = {"task": "visionq.caption", "media": [DATA_URL]}
    first, second = (post(service, body, Idempotency_Key="k-1") for _ in range(2))
    assert first.status_code == 202
    assert first.json()["job_id"] == second.json()["job_id"]


@pytest.mark.parametrize(
    "named", ["my-job", "0b8f6a52-6d4e-4c58-9a55-2f2d3a1b7c1", "{0b8f6a52-6d4e-4c58-9a55-2f2d3a1b7c10}"]
)
def test_an_id_of_the_clients_own_is_a_uuid(service: Service, named: str) -> None:
    answer = service.http.put(f"/v1/jobs/{named}", json=QUESTION)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "job_id")


def test_the_id_of_a_keys_job_cannot_be_taken_in_advance(service: Service) -> None:
    job_id = post(service, QUESTION, Idempotency_Key="k-1").json()["job_id"]
    assert uuid.UUID(job_id).version == 5
    for spelling in (job_id, job_id.upper()):
        answer = service.http.put(f"/v1/jobs/{spelling}", json=QUESTION)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "job_id")
        assert "version 5" in answer.json()["detail"]
    for own in (uuid.uuid1(), uuid.uuid4()):
        assert service.http.put(f"/v1/jobs/{own}", json=QUESTION).json()["job_id"] == str(own)


@pytest.mark.parametrize("key", ["", "k" * 256, "tab\there"])
def test_a_key_that_is_none_is_refused(service: Service, key: str) -> None:
    answer = post(service, QUESTION, Idempotency_Key=key)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Idempotency-Key")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"task": "visionq.caption"}, "media"),
        ({"task": "visionq.vqa", "question": "x", "priority": 12}, "priority"),
        ({"task": "visionq.vqa", "question": "x", "sampling": {"top_p": 2}}, "sampling.top_p"),
        ({"task": "visionq.vqa", "question": "x", "colour": "red"}, "colour"),
        ({"task": "visionq.caption", "media": ["http://host/a.png"]}, "media.0"),
        ({"task": "visionq.caption", "media": ["data:text/html;base64,AA=="]}, "media.0"),
        ({"task": "visionq.caption", "media": ["data:image/png;base64,!!!"]}, "media.0"),
        ({"task": "visionq.vqa", "messages": [{"role": "user", "content": [{"type": "image", "uri": "data:,"}]}]},
         "messages.0.content.0.uri"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(service: Service, body: dict[str, object], field: str) -> None:
    answer = post(service, body)
    problem = answer.json()
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert problem["code"] == "invalid_request"
    assert field in [error["field"] for error in problem["errors"]]
    assert problem["type"] == "urn:visionq:problem:invalid_request"
    assert (problem["status"], problem["title"]) == (422, "Unprocessable Entity")


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"task": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"{}", "application/json", 422),
        (b'{"task": "\\ud800"}', "application/json", 422),
        (b"{}", "text/plain", 415),
        (b"", "application/json", 400),
        (b"nonsense", "multipart/form-data; boundary=x", 400),
        (b"nonsense", "multipart/form-data", 400),
    ],
)
def test_what_is_no_job_is_refused(service: Service, content: bytes, content_type: str, status: int) -> None:
    answer = service.http.post("/v1/jobs", content=content, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


def test_data_urls_are_stored_before_the_job(service: Service, s3_client: S3Client) -> None:
    part = {"type": "image", "uri": DATA_URL}
    text = {"type": "text", "text": "What is it?"}
    bodies = [
        {"task": "visionq.caption", "media": ["s3://media/a.png", DATA_URL]},
        {"task": "visionq.vqa", "messages": [{"role": "user", "content": [part, text]}]},
    ]
    captioned, asked = (job_of(service, post(service, body).json()["job_id"]) for body in bodies)
    first, uri = captioned["media"]  # type: ignore[misc]
    assert first == "s3://media/a.png"
    assert stored(s3_client, uri) == (PNG, "image/png")
    assert asked["messages"][0]["content"][0]["uri"] == uri  # type: ignore[index]
    assert hashlib.sha256(PNG).hexdigest() in uri


def test_a_form_brings_files_and_a_job(service: Service, s3_client: S3Client) -> None:
    clip = b"ftyp" * 100_000
    form = {"job": json.dumps({"task": "visionq.video_qa", "question": "What moves?", "media": ["s3://media/a.png"]})}
    files = [("media", ("a.png", PNG, "image/png")), ("media", ("b.mp4", clip, "video/mp4"))]
    answer = service.http.post("/v1/jobs", data=form, files=files)
    assert answer.status_code == 202, answer.text
    _, image, video = job_of(service, answer.json()["job_id"])["media"]  # type: ignore[misc]
    assert stored(s3_client, image) == (PNG, "image/png")
    assert stored(s3_client, video) == (clip, "video/mp4")


@pytest.mark.parametrize(
    ("form", "files", "field"),
    [
        ({}, [("media", ("a.png", PNG, "image/png"))], "job"),
        ({"job": "{}", "other": "x"}, [("media", ("a.png", PNG, "image/png"))], "other"),
        ({"job": "{}"}, [("media", ("a.html", b"<p>", "text/html"))], "media.0"),
        ({"job": json.dumps(QUESTION | {"media": "x"})}, [("media", ("a.png", PNG, "image/png"))], "media"),
    ],
)
def test_a_wrong_form_is_refused_by_field(
    service: Service, form: dict[str, str], files: list[tuple[str, tuple[str, bytes, str]]], field: str
) -> None:
    answer = service.http.post("/v1/jobs", data=form, files=files)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_nothing_is_stored_for_a_request_that_is_refused(service: Service, s3_client: S3Client) -> None:
    before = uploads(s3_client)
    fresh = "data:image/png;base64," + base64.b64encode(b"never seen before").decode()
    assert post(service, {"task": "visionq.caption", "media": [fresh], "priority": 12}).status_code == 422
    assert uploads(s3_client) == before


def test_a_body_above_the_limit_is_refused_whether_it_says_so_or_not(redis_url: str) -> None:
    with serving(redis_url, api_max_body_bytes=2000, api_max_upload_bytes=4000) as running:
        long = QUESTION | {"question": "x" * 3000}
        told = post(running, long)
        untold = running.http.post(
            "/v1/jobs", content=iter([json.dumps(long).encode()]), headers={"Content-Type": "application/json"}
        )
        form = running.http.post("/v1/jobs", files={"media": ("a.png", b"x" * 5000, "image/png")})
        for answer in (told, untold, form):
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert post(running, QUESTION).status_code == 202


def make_upload(service: Service, content: bytes = PNG, content_type: str = "image/png") -> dict[str, object]:
    body = {"content_type": content_type, "num_bytes": len(content)}
    answer = service.http.post("/v1/uploads", json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, object] = answer.json()
    return found


def put(upload: dict[str, object], content: bytes, content_type: str = "image/png") -> httpx.Response:
    return httpx.put(str(upload["url"]), content=content, headers={"Content-Type": content_type}, timeout=30)


def caption(service: Service, upload: dict[str, object]) -> httpx.Response:
    return post(service, {"task": "visionq.caption", "media": [upload["uri"]]})


def test_an_upload_goes_straight_to_storage_and_into_a_job(service: Service, s3_client: S3Client) -> None:
    upload = make_upload(service)
    assert put(upload, PNG).status_code == 200
    assert stored(s3_client, str(upload["uri"])) == (PNG, "image/png")
    assert caption(service, upload).status_code == 202


@pytest.mark.parametrize("num_bytes", [True, "5", 5.5, 0])
def test_a_size_that_is_none_is_refused(service: Service, num_bytes: object) -> None:
    answer = service.http.post("/v1/uploads", json={"content_type": "image/png", "num_bytes": num_bytes})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "num_bytes")


def test_size_and_type_of_an_upload_are_signed(service: Service) -> None:
    upload = make_upload(service)
    signed = httpx.URL(str(upload["url"])).params["X-Amz-SignedHeaders"].split(";")
    assert {"content-length", "content-type", "host"} <= set(signed)
    assert upload["headers"] == {"Content-Type": "image/png", "Content-Length": str(len(PNG))}


# The storage of these tests checks no signatures, so what was signed can be broken.
@pytest.mark.parametrize(("content", "content_type"), [(PNG + b"more", "image/png"), (PNG, "text/html")])
def test_an_upload_that_broke_its_promise_gets_into_no_job(service: Service, content: bytes, content_type: str) -> None:
    upload = make_upload(service)
    assert put(upload, content, content_type).status_code == 200
    answer = caption(service, upload)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "media.0")
    assert "announced" in answer.json()["detail"]


@pytest.mark.parametrize("spelling", ["uploads//{}", "/uploads/{}", "uploads/{}/"])
def test_an_upload_keeps_its_promise_under_every_spelling(service: Service, s3_client: S3Client, spelling: str) -> None:
    upload = make_upload(service)
    key = S3Object.parse(str(upload["uri"])).key.removeprefix("uploads/")
    # Some storage takes both for one key; that of these tests does not.
    s3_client.put_object(Bucket="media", Key=spelling.format(key), Body=PNG + b"more", ContentType="image/png")
    answer = post(service, {"task": "visionq.caption", "media": [f"s3://media/{spelling.format(key)}"]})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "media.0")
    assert "announced" in answer.json()["detail"]


def test_the_version_that_a_job_names_is_held_against_the_promise(
    redis_url: str, s3_server: S3Server, s3_client: S3Client
) -> None:
    s3_client.create_bucket(Bucket="versions")
    s3_client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    with serving(redis_url, s3_server.url, media_bucket="versions") as running:
        upload = make_upload(running)
        versions = [put(upload, content).headers["x-amz-version-id"] for content in (PNG + b"more", PNG)]
        found = {}
        for version in (*versions, "none"):
            media = [f"{upload['uri']}?versionId={version}"]
            found[version] = post(running, {"task": "visionq.caption", "media": media})
    assert [answer.status_code for answer in found.values()] == [422, 202, 422]
    assert "announced" in found[versions[0]].json()["detail"]
    assert found["none"].json()["code"] == "media_not_found"


def test_an_upload_that_never_came_gets_into_no_job(service: Service) -> None:
    answer = caption(service, make_upload(service))
    assert (answer.status_code, answer.json()["code"]) == (422, "media_not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"content_type": "text/html", "num_bytes": 5}, "content_type"),
        ({"content_type": "image/png", "num_bytes": 0}, "num_bytes"),
        ({"content_type": "image/png", "num_bytes": 10**12}, "num_bytes"),
        ({"content_type": "image/png"}, "num_bytes"),
    ],
)
def test_a_wrong_upload_is_refused_by_field(service: Service, body: dict[str, object], field: str) -> None:
    answer = service.http.post("/v1/uploads", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_an_absent_storage_is_said_to_be_away(redis_url: str, s3_server: S3Server) -> None:
    with serving(redis_url) as running:
        answer = post(running, {"task": "visionq.caption", "media": [DATA_URL]})
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert "Retry-After" in answer.headers
