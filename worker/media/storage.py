"""The S3 client, and the translation of its errors: the object is refused, the worker is refused, or storage is slow.

The response to a refused HEAD has a status only, so the object is requested again by GET, whose response names S3's
error code. Then the worker requests the object that storage served last, or the bucket, and the object once more: if
only the object is refused, it is the object's fault.

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

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

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
#: S3 rejects the worker's credentials or clock, whatever it asks for.
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
#: A range request that transfers one byte.
_FIRST_BYTE: Final = "bytes=0-0"


def s3_client(endpoint_url: str | None, region: str, timeout_s: float, max_connections: int = 64) -> S3Client:
    """Make a worker's S3 client. Path-style addressing works on every S3 server. botocore's own retries are off: they
    would ignore jobs' deadlines and multiply ours. Credentials come from the usual AWS chain.
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
    """Classifies refusals for one worker. Any thread. A call sends up to three requests, and one per bucket that
    has served the worker.
    """

    def __init__(self, client: S3Client) -> None:
        self._client = client
        self._served: dict[str, S3Object] = {}

    def served(self, media: S3Object) -> None:
        """Note that storage has served this object to the worker."""
        self._served[media.bucket] = media

    def judge(self, error: Exception, media: S3Object) -> WorkerError:
        """Translate the error of a failed read of `media`; a refusal is looked into by further requests."""
        if not is_refusal(error):
            return translate(error, media)
        detailed = self._with_code(error, media)
        meaning, is_proven = translate(detailed, media), is_about_credentials(detailed)
        if not (is_proven or isinstance(meaning, MediaForbidden)):
            return meaning
        if self.is_served(media.bucket):
            return self._confirmed(meaning, media)
        # S3 uses these codes for a single bucket, too: one in another region or of another account.
        is_proven = is_proven and not any(
            self.is_served(other) for other in list(self._served) if other != media.bucket
        )
        if is_proven or media.bucket in self._served:
            code = refusal_code(detailed) or "no reason given"
            return StorageRefuses(f"storage refuses this worker ({code})", is_proven=is_proven)
        return MediaRefused(str(meaning))

    def _confirmed(self, meaning: WorkerError, media: S3Object) -> WorkerError:
        """Return what a refusal means after storage has served the worker something else: it may be over by now.

        One that ended in between was the worker's, and no job may end with it. So the object is requested once more.
        """
        try:
            self._read_first_byte(media)
        except STORAGE_ERRORS as error:
            return meaning if is_refusal(error) else translate(error, media)
        return StorageUnavailable(f"storage refused to read {media.uri} for a moment")

    def is_served(self, bucket: str) -> bool:
        """Request the object that storage served last from a bucket, else the bucket; return whether it was not
        refused.

        Absence counts as served.
        """
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
        except ClientError as detailed:
            return detailed
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


def is_passing(error: Exception) -> bool:
    """Whether the same read may succeed later: no answer, overload, a truncated or changed body."""
    if isinstance(error, ClientError):
        status, code = _status_and_code(error)
        return status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES
    return isinstance(error, _PASSING) and not isinstance(error, _LASTING)


def is_refusal(error: Exception) -> bool:
    """Whether storage refuses the request for good, for a reason other than absence."""
    return isinstance(error, ClientError) and not is_passing(error) and not is_absence(error)


def is_absence(error: Exception) -> bool:
    """Whether storage reports that the object, version or bucket does not exist."""
    if not isinstance(error, ClientError):
        return False
    status, code = _status_and_code(error)
    return status in _MISSING_STATUS or code in _MISSING_CODES


def is_about_credentials(error: Exception) -> bool:
    """Whether storage refused the worker's clock, key or token, not the object."""
    return refusal_code(error) in _CREDENTIAL_CODES


def refusal_code(error: Exception) -> str:
    """Return S3's error code; empty where the response had no body, as for HEAD."""
    code = _status_and_code(error)[1] if isinstance(error, ClientError) else ""
    return "" if code.isdigit() else code


def translate(error: Exception, media: S3Object) -> WorkerError:
    """Translate the error of a failed read of `media`."""
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
    """Return S3's code for a message. For HEAD, whose responses have no body, botocore repeats the status there."""
    return "" if not code or code.isdigit() else f", {code}"


def _status_and_code(error: ClientError) -> tuple[int, str]:
    response: dict[str, Any] = getattr(error, "response", {})
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    return status or (int(code) if code.isdigit() else 0), code
