"""The S3 client, and what its errors mean: the object is refused, the worker is, or storage is slow.

The answer to a HEAD says why with a number only, so the object is asked for once more by GET, whose body names S3's
code. Then the worker asks for what storage served it last, or for the bucket: if it gets that, the object is refused.

botocore's and urllib3's exceptions are translated here, once, into the worker's own. Messages name the object, the HTTP
status and S3's code; never an endpoint, a credential or botocore's own text, which may hold either.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidDNSNameError,
    MetadataRetrievalError,
    ParamValidationError,
    ProxyConnectionError,
    SSLError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as StorageConnectionError
from urllib3.exceptions import HTTPError

from api_stub.contract.media import S3Object
from worker.errors import (
    DiskFailed,
    InvalidRequest,
    MediaForbidden,
    MediaNotFound,
    MediaRefused,
    RequestError,
    StorageRefuses,
    StorageUnavailable,
    WorkerError,
)

#: Everything a read through boto3 raises.
STORAGE_ERRORS: Final = (BotoCoreError, ClientError, HTTPError, OSError)

_PASSING: Final = (
    StorageConnectionError,
    HTTPClientError,
    IncompleteReadError,
    FlexibleChecksumError,
    ChecksumError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    TokenRetrievalError,
    HTTPError,
)
_LASTING: Final = (SSLError, ProxyConnectionError)
_MALFORMED: Final = (ParamValidationError, InvalidDNSNameError)
_PASSING_CODES: Final = frozenset(
    {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "InternalError", "503"}
)
_PASSING_STATUS: Final = frozenset({408, 409, 412, 425, 429})
_MISSING_CODES: Final = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion"})
_MISSING_STATUS: Final = frozenset({404, 405, 410})
#: S3 does not take the worker for whom it says it is, whatever it asks for.
_CREDENTIAL_CODES: Final = frozenset(
    {
        "AuthFailure",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "InvalidTokenId",
        "MissingAuthenticationToken",
        "NotSignedUp",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)


def is_passing(error: Exception) -> bool:
    """Tell whether the same read may succeed in a moment: silence, overload, a cut or changed body."""
    if isinstance(error, ClientError):
        status, code = _status_and_code(error)
        return status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES
    return isinstance(error, _PASSING) and not isinstance(error, _LASTING)


def is_refusal(error: Exception) -> bool:
    """Tell whether storage understood who asks for what, and says no for good."""
    return isinstance(error, ClientError) and not is_passing(error) and not is_absence(error)


def is_absence(error: Exception) -> bool:
    """Tell whether storage says that there is no such thing."""
    if not isinstance(error, ClientError):
        return False
    status, code = _status_and_code(error)
    return status in _MISSING_STATUS or code in _MISSING_CODES


def is_about_credentials(error: Exception) -> bool:
    """Tell whether storage refused the worker's clock, key or token, not the object."""
    return refusal_code(error) in _CREDENTIAL_CODES


def refusal_code(error: Exception) -> str:
    """Return S3's own code; empty where the answer had no body, as those to HEAD have none."""
    code = _status_and_code(error)[1] if isinstance(error, ClientError) else ""
    return "" if code.isdigit() else code


def translate(error: Exception, media: S3Object) -> WorkerError:
    """Return what a failed read of `media` means for its job."""
    if isinstance(error, ClientError) and not is_passing(error):
        return _refusal(*_status_and_code(error), media)
    if isinstance(error, ClientError):
        status, code = _status_and_code(error)
        if status == 412:
            return StorageUnavailable(f"{media.uri} keeps changing while it is read")
        return StorageUnavailable(f"storage answered {status} ({code}) for {media.uri}")
    if isinstance(error, _MALFORMED):
        return InvalidRequest(f"storage cannot be asked for {media.uri}: not a valid bucket, key or version")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, STORAGE_ERRORS[:3]):
        return DiskFailed(f"{media.uri} could not be stored on the worker's disk: {error.strerror}")
    return StorageUnavailable(f"storage did not deliver {media.uri} ({type(error).__name__})")


def _refusal(status: int, code: str, media: S3Object) -> RequestError:
    if status in _MISSING_STATUS or code in _MISSING_CODES:
        return MediaNotFound(f"no such object: {media.uri}{_detail(code)}")
    if status == 400 and media.version_id is not None:
        return MediaNotFound(f"no such version: {media.uri}")
    if status in (401, 403):
        return MediaForbidden(
            f"storage refused to read {media.uri} ({status}{_detail(code)}): the worker may not read it, "
            "or it does not exist and the worker may not list the bucket"
        )
    return MediaForbidden(f"storage refused to read {media.uri} ({status}{_detail(code)})")


def _detail(code: str) -> str:
    """S3's own code; HEAD answers have no body, so botocore repeats the status there."""
    return "" if not code or code.isdigit() else f", {code}"


def _status_and_code(error: ClientError) -> tuple[int, str]:
    response: dict[str, Any] = getattr(error, "response", {})
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    return status or (int(code) if code.isdigit() else 0), code


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
