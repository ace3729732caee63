"""Requests that no honest client makes are refused with a status of theirs; none is a mistake of the gateway."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from api_stub.gateway.openai.batches.lines import Line, custom_id_of
from tests.gateway.service import Service, serving
from tests.gateway.test_jobs import submit

JSON = "application/json"


def test_an_origin_that_is_no_address_is_refused(service: Service) -> None:
    assert service.http.get("/v1/jobs", headers={"Origin": "http://["}).status_code == 403


def test_a_seq_that_redis_cannot_count_to_is_refused(service: Service) -> None:
    path = f"/v1/jobs/{submit(service)}/events"
    assert service.http.get(path, params={"after": "9" * 30}).status_code == 422


def test_a_cursor_of_other_digits_is_refused(service: Service) -> None:
    assert service.http.get("/v1/jobs", params={"cursor": "\u0661"}).status_code == 422


def test_a_tenant_that_is_no_text_is_refused_beside_a_data_url(service: Service) -> None:
    job = {"task": "visionq.caption", "media": ["data:image/png;base64,AAAA"], "tenant": "\ud800"}
    answer = service.http.post("/v1/jobs", content=json.dumps(job), headers={"Content-Type": JSON})
    assert answer.status_code == 422


@pytest.mark.parametrize("charset", ["undefined", "idna", "nonsense"])
def test_a_form_in_an_odd_charset_is_refused(service: Service, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="job"\r\n\r\n{"\xff..":\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    assert service.http.post("/v1/jobs", content=body, headers=headers).status_code in (400, 422)


def test_a_file_whose_name_is_no_text_is_refused(service: Service) -> None:
    head = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\nContent-Disposition: form-data; '
    )
    body = head + b'name="file"; filename="\\ud800"\r\n\r\n{}\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    assert service.http.post("/v1/files", content=body, headers=headers).status_code < 500


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/batches"])
def test_json_that_calls_itself_a_form_has_the_bound_of_json(redis_url: str, path: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with serving(redis_url, api_max_body_bytes=1024) as running:
        assert httpx.post(running.url + path, content=b" " * 2000, headers=headers).status_code == 413


def test_a_line_whose_name_is_no_text_has_none() -> None:
    line = Line(1, 30, b'{"custom_id": "\\ud800"}')
    assert asyncio.run(custom_id_of(line)) is None


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/inline"])
def test_a_form_of_many_small_files_is_refused(service: Service, path: str) -> None:
    parts = [("file", (f"{number}.png", b"x", "image/png")) for number in range(2)]
    answer = service.http.post(path, files=parts, data={"purpose": "batch"})
    assert (answer.status_code, "files" in answer.text) == (400, True)
