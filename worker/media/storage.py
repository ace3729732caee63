"""The S3 client, and who is refused when storage refuses a read: the object, or the worker whatever it asks for.

The answer to a HEAD says why with a number only, so the object is asked for once more by GET, whose body names S3's
code. Then the worker asks for what storage served it last, or for the bucket: if it gets that, the object is refused.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from api_stub.contract.media import S3Object
from worker.errors import MediaForbidden, MediaRefused, StorageRefuses, WorkerError
from worker.media.faults import (
    STORAGE_ERRORS,
    is_about_credentials,
    is_absence,
    is_refusal,
    refusal_code,
    translate,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Enough to see that a body comes.
_FIRST_BYTE: Final = "bytes=0-0"


def s3_client(endpoint_url: str | None, region: str, timeout_s: float, max_connections: int = 64) -> S3Client:
    """Make the client a worker keeps. Path-style addressing works on every S3 server. botocore's own retries are off:
    they would be invisible to deadlines and multiply ours. Credentials come from the usual AWS chain.
    """
    config = Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=max_connections,
        s3={"addressing_style": "path"},
    )
    client: S3Client = boto3.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
    return client


class Refusals:
    """Judges refusals for one worker. Any thread; a call asks storage up to twice, and each bucket that served it."""

    def __init__(self, client: S3Client) -> None:
        self._client = client
        self._served: dict[str, S3Object] = {}

    def served(self, media: S3Object) -> None:
        """Storage has served this object to the worker."""
        self._served[media.bucket] = media

    def judge(self, error: Exception, media: S3Object) -> WorkerError:
        """Return what a failed read of `media` means for its job, asking storage again when it was a refusal."""
        if not is_refusal(error):
            return translate(error, media)
        told = self._with_code(error, media)
        meaning, is_proven = translate(told, media), is_about_credentials(told)
        if not (is_proven or isinstance(meaning, MediaForbidden)) or self.is_served(media.bucket):
            return meaning
        # S3 says so of one bucket, too: of one in another region, or of another account.
        is_proven = is_proven and not any(
            self.is_served(other) for other in list(self._served) if other != media.bucket
        )
        if is_proven or media.bucket in self._served:
            code = refusal_code(told) or "no reason given"
            return StorageRefuses(f"storage refuses this worker ({code})", is_proven=is_proven)
        return MediaRefused(str(meaning))

    def is_served(self, bucket: str) -> bool:
        """Ask for what storage served last from a bucket, else for the bucket itself; tell whether this was not
        refused. What is gone was not refused either."""
        media = self._served.get(bucket)
        try:
            if media is not None:
                self._read_first_byte(media)
            else:
                self._client.head_bucket(Bucket=bucket)
        except STORAGE_ERRORS as error:
            return is_absence(error)
        return True

    def _with_code(self, error: Exception, media: S3Object) -> Exception:
        if refusal_code(error):
            return error
        try:
            self._read_first_byte(media)
        except ClientError as told:
            return told
        except STORAGE_ERRORS:
            pass
        return error

    def _read_first_byte(self, media: S3Object) -> None:
        answer = self._client.get_object(Bucket=media.bucket, Key=media.key, Range=_FIRST_BYTE, **version_of(media))
        with closing(answer["Body"]) as body:
            body.read()


def version_of(media: S3Object) -> dict[str, Any]:
    """Return the argument of boto3's calls that names a version."""
    return {"VersionId": media.version_id} if media.version_id else {}
