"""Every exception of botocore and urllib3 has a meaning for the job."""

from __future__ import annotations

import inspect

import botocore.exceptions
import pytest
import urllib3.exceptions
from botocore.exceptions import BotoCoreError, ClientError

from api_stub.contract.error import ErrorCode
from api_stub.contract.media import S3Object
from worker.errors import MediaForbidden, MediaNotFound, StorageUnavailable
from worker.media.storage import STORAGE_ERRORS, is_passing, translate

MEDIA = S3Object("media", "a/b.png")

#: Faults of a moment. A class of botocore's that is neither here nor in LASTING was never thought about.
PASSING = {
    "AwsChunkedWrapperError": False,
    "ChecksumError": True,
    "ConnectTimeoutError": True,
    "ConnectionClosedError": True,
    "ConnectionError": True,
    "CredentialRetrievalError": True,
    "EndpointConnectionError": True,
    "FlexibleChecksumError": True,
    "HTTPClientError": True,
    "IncompleteReadError": True,
    "MetadataRetrievalError": True,
    "ProxyConnectionError": False,
    "ReadTimeoutError": True,
    "ResponseStreamingError": True,
    "SSLError": False,
    "TokenRetrievalError": True,
}
#: Set-up errors of the worker's own client: no try of the same worker helps, another worker may be better set up.
LASTING_WORDS = (
    "Config", "Credential", "Endpoint", "Region", "Profile", "Login", "SSO", "Token", "Signature", "Arn", "Service",
    "Version", "Waiter", "Paginat", "Pageable", "Stub", "Param", "Validation", "Unknown", "Invalid", "DataNotFound",
    "Missing", "MD5", "Range", "Unseekable", "Undefined", "Expression", "NoAuth", "MFA", "Capacity", "BotoCoreError",
    "Outpost", "Defaults", "AuthToken", "Dependency", "UnsupportedS3",
)  # fmt: skip


def classes_of(module: object, root: type[Exception]) -> list[type[Exception]]:
    found = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, root)]
    return sorted(set(found), key=lambda one: one.__name__)


def bare(kind: type[Exception]) -> Exception:
    """An instance without its constructor's demands."""
    return kind.__new__(kind)


def refusal(status: int, code: str = "") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize("kind", classes_of(botocore.exceptions, BotoCoreError), ids=lambda one: one.__name__)
def test_every_botocore_error_is_known_and_coded(kind: type[Exception]) -> None:
    name = kind.__name__
    assert name in PASSING or any(word in name for word in LASTING_WORDS), f"decide about botocore's new {name}"
    assert is_passing(bare(kind)) is PASSING.get(name, False)
    assert translate(bare(kind), MEDIA).code in (ErrorCode.STORAGE_UNAVAILABLE, ErrorCode.INVALID_REQUEST)
    assert issubclass(kind, STORAGE_ERRORS)


@pytest.mark.parametrize(
    "kind", classes_of(urllib3.exceptions, urllib3.exceptions.HTTPError), ids=lambda one: one.__name__
)
def test_every_urllib3_error_is_a_passing_fault(kind: type[Exception]) -> None:
    assert is_passing(bare(kind))
    assert isinstance(translate(bare(kind), MEDIA), StorageUnavailable)
    assert issubclass(kind, STORAGE_ERRORS)


@pytest.mark.parametrize("status", [408, 409, 412, 425, 429, 500, 502, 503, 504, 599])
def test_overload_and_change_are_passing(status: int) -> None:
    assert is_passing(refusal(status))
    assert isinstance(translate(refusal(status), MEDIA), StorageUnavailable)


@pytest.mark.parametrize("code", ["SlowDown", "RequestTimeout", "Throttling"])
def test_overload_is_passing_by_its_code_too(code: str) -> None:
    assert is_passing(refusal(400, code))


@pytest.mark.parametrize(
    ("status", "code"), [(404, "404"), (404, "NoSuchKey"), (404, "NoSuchBucket"), (405, "405"), (0, "NoSuchVersion")]
)
def test_absence_is_final(status: int, code: str) -> None:
    assert not is_passing(refusal(status, code))
    assert isinstance(translate(refusal(status, code), MEDIA), MediaNotFound)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (401, ""), (400, "ExpiredToken"), (301, "")])
def test_a_refusal_is_final_and_names_the_object(status: int, code: str) -> None:
    error = translate(refusal(status, code), MEDIA)
    assert not is_passing(refusal(status, code))
    assert isinstance(error, MediaForbidden)
    assert "s3://media/a/b.png" in str(error)
    assert code in str(error)


def test_botocores_own_words_are_never_repeated() -> None:
    secret = botocore.exceptions.EndpointConnectionError(endpoint_url="https://user:hunter2@store.internal/a")
    assert "hunter2" not in str(translate(secret, MEDIA))
    assert "store.internal" not in str(translate(secret, MEDIA))


def test_a_full_disk_is_told_apart_from_storage() -> None:
    error = translate(OSError(28, "No space left on device"), MEDIA)
    assert "No space left on device" in str(error)
    assert not is_passing(OSError(28, "No space left on device"))
