"""Uploads and presigned URLs against a real S3 server."""

from __future__ import annotations

import inspect
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.exceptions
import botocore.exceptions
import pytest

from api_stub.contract.media import S3Object
from api_stub.errors import StorageRefused, StoreUnavailable, VisionqError
from api_stub.settings import ClientSettings
from api_stub.storage import Storage, _translated
from tests.servers import S3Server, free_port

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture
def storage(s3_server: S3Server, s3_client: S3Client) -> Iterator[Storage]:
    opened = Storage(ClientSettings(s3_endpoint_url=s3_server.url))
    yield opened
    opened.close()


def settings(**fields: str) -> ClientSettings:
    return ClientSettings.model_validate(fields)


def test_an_upload_is_the_file_with_its_type_under_a_new_key(
    storage: Storage, s3_client: S3Client, tmp_path: Path
) -> None:
    picture = tmp_path / "my cat.PNG"
    picture.write_bytes(os.urandom(1000))
    uris = {storage.upload(picture), storage.upload(str(picture))}
    assert len(uris) == 2
    for uri in uris:
        target = S3Object.parse(uri)
        stored = s3_client.get_object(Bucket=target.bucket, Key=target.key)
        assert stored["Body"].read() == picture.read_bytes()
        assert stored["ContentType"] == "image/png"
        assert (target.bucket, target.key[-4:]) == ("media", ".png")
        assert "cat" not in target.key


def test_a_file_larger_than_one_part_arrives_whole(storage: Storage, s3_client: S3Client, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(os.urandom(1024) * (9 * 1024))
    target = S3Object.parse(storage.upload(clip))
    assert s3_client.get_object(Bucket=target.bucket, Key=target.key)["Body"].read() == clip.read_bytes()


def test_an_empty_file_without_an_ending_is_stored_too(storage: Storage, s3_client: S3Client, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    target = S3Object.parse(storage.upload(tmp_path / "empty"))
    head = s3_client.head_object(Bucket=target.bucket, Key=target.key)
    assert (head["ContentLength"], head["ContentType"]) == (0, "application/octet-stream")


def test_a_missing_file_is_an_ordinary_file_error(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "none.png")


def test_a_presigned_put_stores_and_a_presigned_get_reads_without_credentials(storage: Storage) -> None:
    ticket = storage.presign_put(".png", "image/png", 5)
    request = urllib.request.Request(ticket.url, data=b"12345", headers=ticket.headers, method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(storage.presign_get(ticket.uri), timeout=10) as answer:
        assert answer.read() == b"12345"
        assert answer.headers["Content-Type"] == "image/png"


def test_size_and_type_are_part_of_the_signature(storage: Storage) -> None:
    url = storage.presign_put(".png", "image/png", 5).url
    assert "X-Amz-SignedHeaders=content-length%3Bcontent-type%3Bhost" in url


def test_presigned_urls_name_the_public_host(s3_server: S3Server) -> None:
    storage = Storage(settings(s3_endpoint_url=s3_server.url, s3_public_url="https://media.example.com"))
    assert storage.presign_get("s3://media/a b.png").startswith("https://media.example.com/media/a%20b.png?")
    storage.close()


def test_a_missing_bucket_is_refused_by_name(s3_server: S3Server, s3_client: S3Client, tmp_path: Path) -> None:
    storage = Storage(settings(s3_endpoint_url=s3_server.url, media_bucket="nowhere"))
    (tmp_path / "a.png").write_bytes(b"a")
    with pytest.raises(StorageRefused, match="NoSuchBucket on bucket 'nowhere'"):
        storage.upload(tmp_path / "a.png")
    storage.close()


def test_no_credentials_are_refused_with_the_names_to_set(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    storage = Storage(settings(s3_endpoint_url=s3_server.url))
    (tmp_path / "a.png").write_bytes(b"a")
    with pytest.raises(StorageRefused, match="AWS_ACCESS_KEY_ID"):
        storage.upload(tmp_path / "a.png")
    storage.close()


def test_a_storage_that_refuses_connections_is_unavailable_soon(tmp_path: Path) -> None:
    storage = Storage(settings(s3_endpoint_url=f"http://127.0.0.1:{free_port()}"))
    (tmp_path / "a.png").write_bytes(b"a")
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="bucket 'media'"):
        storage.upload(tmp_path / "a.png")
    assert time.monotonic() - begin < 10
    storage.close()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_storage_in_trouble_is_unavailable_not_refusing(status: int) -> None:
    response = {"Error": {"Code": "Odd"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(StoreUnavailable, match="Odd on bucket 'media'"), _translated("media"):
        raise botocore.exceptions.ClientError(response, "PutObject")


def everything_that_boto3_raises() -> list[Exception]:
    """One of each of botocore's and boto3's errors that a call may raise."""
    raised: list[Exception] = []
    for module in (botocore.exceptions, boto3.exceptions):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error)):
                error = kind.__new__(kind)
                Exception.__init__(error, "secret-key")
                raised.append(error)
    return raised


@pytest.mark.parametrize("error", everything_that_boto3_raises(), ids=lambda error: type(error).__name__)
def test_no_error_of_boto3_passes_untranslated_or_with_its_own_text(error: Exception) -> None:
    with pytest.raises(VisionqError) as translated, _translated("media"):
        raise error
    assert translated.value.__cause__ is error
    assert "secret-key" not in str(translated.value)


def test_a_silent_storage_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("api_stub.storage.READ_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        storage = Storage(settings(s3_endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}"))
        (tmp_path / "a.png").write_bytes(b"a")
        with pytest.raises(StoreUnavailable, match="Timeout"):
            storage.upload(tmp_path / "a.png")
        storage.close()
