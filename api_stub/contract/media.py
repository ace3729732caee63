"""References to media in S3-compatible storage, and how many pixels of a picture or a frame a model is shown.

A reference is `s3://bucket/key[?versionId=…]`, keys percent-encoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import quote, unquote

from pydantic import AfterValidator, Field, model_validator

from api_stub.contract.wire import WholeNumber, WireModel

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_URI = re.compile(r"s3://([^/?#]*)(/[^?#]*)?(\?[^#]*)?(#.*)?", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,19}(?=://)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VERSION_QUERY = re.compile(r"^\?versionId=([^&=]+)$")
#: Storage that keeps keys as files, and proxies before it, may leave the bucket by these.
_DOTS = frozenset({".", ".."})
MAX_KEY_BYTES = 1024  # S3's own limit on object keys


@dataclass(frozen=True, slots=True)
class S3Object:
    """A parsed media reference. `key` is decoded; `version_id` is None for the newest version."""

    bucket: str
    key: str
    version_id: str | None = None

    @classmethod
    def parse(cls, uri: str) -> S3Object:
        """Parse a media URI. Raises ValueError that says what is wrong, never the URI: it may be signed."""
        if _CONTROL.search(uri):
            raise ValueError("control characters in a media URI must be percent-encoded")
        parts = _URI.fullmatch(uri)
        if parts is None:
            scheme = _SCHEME.match(uri)
            raise ValueError(f"media must be an s3:// URI, got {scheme.group() + '://…' if scheme else 'no scheme'}")
        bucket, path, query, fragment = parts.groups(default="")
        if "@" in bucket or ":" in bucket:
            raise ValueError("s3:// is followed by a bucket's name, without user, password or port")
        if not _BUCKET.match(bucket):
            raise ValueError(f"not an S3 bucket name: {bucket[:80]!r}")
        key = unquote(path[1:], errors="strict")
        if not key or len(key.encode()) > MAX_KEY_BYTES:
            raise ValueError(f"an S3 key has 1 to {MAX_KEY_BYTES} bytes, got {len(key.encode())}")
        dots = next((segment for segment in key.split("/") if segment in _DOTS), None)
        if dots is not None:
            raise ValueError(f"an S3 key must have no segment {dots!r}, got {key[:80]!r}")
        if fragment:
            raise ValueError("a '#' in an S3 key must be percent-encoded")
        version = _VERSION_QUERY.match(query)
        if query and version is None:
            raise ValueError("only ?versionId=… may follow an S3 key")
        return cls(bucket, key, unquote(version.group(1)) if version else None)

    @property
    def uri(self) -> str:
        """The canonical URI of this reference."""
        version = f"?versionId={quote(self.version_id, safe='')}" if self.version_id else ""
        return f"s3://{self.bucket}/{quote(self.key, safe='/')}{version}"


def _checked(uri: str) -> str:
    return S3Object.parse(uri).uri


#: A media URI in a wire type: checked and brought to its canonical spelling.
MediaUri = Annotated[str, AfterValidator(_checked)]


#: 16 384 × 16 384: more than any processor makes of a picture.
MAX_PIXELS: Final = 2**28

PixelCount = Annotated[WholeNumber, Field(ge=1, le=MAX_PIXELS)]


class MediaOptions(WireModel):
    """Limits for every picture and frame of a job, after resizing; the processor rounds to whole patches or tiles.

    A model whose processor takes no such limit refuses the job.
    """

    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None

    @model_validator(mode="after")
    def _ordered(self) -> MediaOptions:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is above max_pixels, {self.max_pixels}")
        return self

    @property
    def are_empty(self) -> bool:
        """Whether nothing is asked."""
        return self.min_pixels is None and self.max_pixels is None
