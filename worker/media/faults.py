"""Storage errors, translated once: botocore's and urllib3's exceptions in, the worker's own out.

Messages name the object, the HTTP status and S3's code; never an endpoint, a credential or botocore's own text,
which may hold either.
"""

from __future__ import annotations

from typing import Any, Final

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
    RequestError,
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
