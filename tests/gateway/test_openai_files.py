"""A file's bytes: the status waits for the first of them, so that a file that is gone has the status of an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from api_stub.gateway.openai.files import CHUNK_BYTES
from tests.gateway.openai_stack import openai_client
from tests.gateway.service import Service, serving
from tests.servers import S3Server
from tests.storage_faults import Status, faulty_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_a_file_of_several_reads_comes_back_whole(service: Service, s3_client: S3Client) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 256) * 2 + b"the end"
    with openai_client(service.url) as client:
        file = client.files.create(file=("input.jsonl", content), purpose="batch")
        assert client.files.content(file.id).content == content


def test_a_file_whose_object_is_gone_is_not_found(service: Service, s3_client: S3Client) -> None:
    with openai_client(service.url) as client:
        file = client.files.create(file=("input.jsonl", b"{}"), purpose="batch")
        for entry in s3_client.list_objects_v2(Bucket="media", Prefix="files/")["Contents"]:
            s3_client.delete_object(Bucket="media", Key=entry["Key"])
        with pytest.raises(openai.NotFoundError) as gone:
            client.files.content(file.id)
    assert gone.value.code == "file_not_found"
    assert file.id in gone.value.message


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [(Status(403, "AccessDenied"), 502, "storage_refused"), (Status(503, "SlowDown"), 503, "store_unavailable")],
)
def test_storage_that_gives_no_byte_is_told_by_the_status(
    service: Service, s3_client: S3Client, s3_server: S3Server, fault: Status, status: int, code: str
) -> None:
    with openai_client(service.url) as client:
        file = client.files.create(file=("input.jsonl", b"{}"), purpose="batch")
    with faulty_storage(s3_server.url) as storage:
        storage.plan["GET"] = [fault] * 4
        url = service.gateway.settings.redis_url.get_secret_value()
        with serving(url, storage.url) as other:
            answer = other.http.get(f"/v1/files/{file.id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
