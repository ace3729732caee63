"""Objects in S3: streamed uploads and presigned URLs. Knows no jobs.

One boto3 client per Storage, safe to use from several threads. botocore's errors are translated here, once.
"""

from __future__ import annotations

import mimetypes
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as botocore_errors
from botocore.config import Config

from api_stub.contract.media import S3Object
from api_stub.errors import StorageRefused, StoreUnavailable
from api_stub.settings import ClientSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S: Final = 3.0
READ_TIMEOUT_S: Final = 20.0
UPLOAD_PREFIX: Final = "uploads/"
DEFAULT_CONTENT_TYPE: Final = "application/octet-stream"

# One part at a time: memory stays at one part (8 MiB) however large the clip is.
_TRANSFER: Final = TransferConfig(use_threads=False)
_BUSY_CODES: Final = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"})


@dataclass(frozen=True, slots=True)
class PresignedPut:
    """Leave to PUT one object: send exactly `headers` with the body to `url`, before `expires_s` seconds are over."""

    uri: str
    url: str
    headers: dict[str, str]
    expires_s: int


@dataclass(frozen=True, slots=True)
class ObjectHead:
    """What S3 says about an object without sending it."""

    num_bytes: int
    content_type: str


class Storage:
    """The media bucket."""

    def __init__(self, settings: ClientSettings) -> None:
        self._bucket = settings.media_bucket
        self._client = _connect(settings.s3_endpoint_url, settings.s3_region)
        public_url = settings.s3_public_url
        # A URL is signed for the host it names, so a public name needs its own client. Signing sends nothing.
        self._signer = _connect(public_url, settings.s3_region) if public_url else self._client

    def upload(self, path: str | Path) -> str:
        """Store a local file as a new object and return its `s3://` URI. Reads the file in parts.

        Raises OSError (no such file), StoreUnavailable, StorageRefused.
        """
        source = Path(path)
        target = S3Object(self._bucket, _new_key(source.suffix))
        extra = {"ContentType": content_type_of(source.name)}
        with source.open("rb") as file, _translated(self._bucket):
            self._client.upload_fileobj(file, target.bucket, target.key, ExtraArgs=extra, Config=_TRANSFER)
        return target.uri

    def put(self, uri: str, content: BinaryIO, content_type: str) -> None:
        """Store an open file under a URI. Raises ValueError (no media URI), StoreUnavailable, StorageRefused."""
        target = S3Object.parse(uri)
        extra = {"ContentType": content_type}
        with _translated(target.bucket):
            self._client.upload_fileobj(content, target.bucket, target.key, ExtraArgs=extra, Config=_TRANSFER)

    def head(self, uri: str) -> ObjectHead | None:
        """Look at an object; None when there is none. Raises ValueError, StoreUnavailable, StorageRefused."""
        source = S3Object.parse(uri)
        try:
            with _translated(source.bucket):
                answer = self._client.head_object(Bucket=source.bucket, Key=source.key, **_version(source))
        except StorageRefused as error:
            if _is_missing(error.__cause__, source):
                return None
            raise
        return ObjectHead(answer["ContentLength"], answer["ContentType"])

    def read(self, uri: str, start: int, num_bytes: int) -> bytes:
        """Read a part of an object, less at its end; it must have more than `start` bytes.

        Raises ValueError, StoreUnavailable, StorageRefused.
        """
        source = S3Object.parse(uri)
        span = f"bytes={start}-{start + num_bytes - 1}"
        with _translated(source.bucket):
            answer = self._client.get_object(Bucket=source.bucket, Key=source.key, Range=span, **_version(source))
            with closing(answer["Body"]) as body:
                return body.read()

    def delete(self, uri: str) -> None:
        """Delete an object; none is no error. Raises ValueError, StoreUnavailable, StorageRefused."""
        target = S3Object.parse(uri)
        with _translated(target.bucket):
            self._client.delete_object(Bucket=target.bucket, Key=target.key, **_version(target))

    def presign_put(self, suffix: str, content_type: str, num_bytes: int, expires_s: int = 900) -> PresignedPut:
        """Sign a PUT of exactly `num_bytes` bytes of `content_type` to a new object whose key ends in `suffix`."""
        target = S3Object(self._bucket, _new_key(suffix))
        parameters = {
            "Bucket": target.bucket,
            "Key": target.key,
            "ContentType": content_type,
            "ContentLength": num_bytes,
        }
        with _translated(self._bucket):
            url = self._signer.generate_presigned_url("put_object", Params=parameters, ExpiresIn=expires_s)
        headers = {"Content-Type": content_type, "Content-Length": str(num_bytes)}
        return PresignedPut(target.uri, url, headers, expires_s)

    def presign_get(self, uri: str, expires_s: int = 900) -> str:
        """Sign a GET of an object. Raises ValueError when `uri` is no media URI."""
        source = S3Object.parse(uri)
        parameters = {"Bucket": source.bucket, "Key": source.key, **_version(source)}
        with _translated(source.bucket):
            return self._signer.generate_presigned_url("get_object", Params=parameters, ExpiresIn=expires_s)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._signer.close()


def content_type_of(name: str) -> str:
    """Return the media type that a file name's ending stands for."""
    return mimetypes.guess_type(name)[0] or DEFAULT_CONTENT_TYPE


def _version(source: S3Object) -> dict[str, Any]:
    return {} if source.version_id is None else {"VersionId": source.version_id}


def _is_missing(error: BaseException | None, source: S3Object) -> bool:
    if not isinstance(error, botocore_errors.ClientError):
        return False
    # To a version that is no version's name S3 says 400, to one that marks the object as deleted 405.
    answers = {404} if source.version_id is None else {400, 404, 405}
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in answers


def _new_key(suffix: str) -> str:
    """A key that was never used. The file's own name stays at home: it may tell more than its owner wants."""
    return f"{UPLOAD_PREFIX}{uuid.uuid4()}{suffix.lower()}"


def _connect(endpoint_url: str | None, region: str) -> S3Client:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 2},
        signature_version="s3v4",
        # S3 look-alikes know neither bucket host names nor the newer trailing checksums.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # Its own session: boto3's default one is shared by the whole process and unsafe to start from two threads.
    session = boto3.session.Session(region_name=region)
    client: S3Client = session.client("s3", endpoint_url=endpoint_url, config=config)
    return client


@contextmanager
def _translated(bucket: str) -> Iterator[None]:
    """Translate what boto3 raises. Messages name the bucket and S3's code, never a URL or a key id."""
    try:
        yield
    except botocore_errors.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= 500 or status == 429 or code in _BUSY_CODES:
            raise StoreUnavailable(f"S3 is busy: {code} on bucket {bucket!r}") from error
        raise StorageRefused(f"S3 refused: {code} on bucket {bucket!r}") from error
    except (botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError) as error:
        raise StorageRefused("no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (botocore_errors.HTTPClientError, botocore_errors.ConnectionError) as error:
        raise StoreUnavailable(f"S3 did not answer: {type(error).__name__} on bucket {bucket!r}") from error
    except (botocore_errors.BotoCoreError, Boto3Error) as error:
        raise StorageRefused(f"S3 call failed: {type(error).__name__} on bucket {bucket!r}") from error
