"""References to media in S3-compatible storage: `s3://bucket/key[?versionId=…]`, keys percent-encoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_VERSION_QUERY = re.compile(r"^versionId=([^&=]+)$")
MAX_KEY_BYTES = 1024  # S3's own limit on object keys


@dataclass(frozen=True, slots=True)
class S3Object:
    """A parsed media reference. `key` is decoded; `version_id` is None for the newest version."""

    bucket: str
    key: str
    version_id: str | None = None

    @classmethod
    def parse(cls, uri: str) -> S3Object:
        """Parse a media URI. Raises ValueError that names the URI and what is wrong with it."""
        parts = urlsplit(uri)
        if parts.scheme != "s3":
            raise ValueError(f"media must be an s3:// URI, got {uri[:200]!r}")
        if not _BUCKET.match(parts.netloc):
            raise ValueError(f"not an S3 bucket name: {parts.netloc[:80]!r}")
        key = unquote(parts.path[1:], errors="strict")
        if not key or len(key.encode()) > MAX_KEY_BYTES:
            raise ValueError(f"an S3 key has 1 to {MAX_KEY_BYTES} bytes, got {len(key.encode())}")
        if parts.fragment:
            raise ValueError(f"a '#' in an S3 key must be percent-encoded: {uri[:200]!r}")
        version = _VERSION_QUERY.match(parts.query)
        if parts.query and version is None:
            raise ValueError(f"only ?versionId=… may follow an S3 key, got ?{parts.query[:80]!r}")
        return cls(parts.netloc, key, unquote(version.group(1)) if version else None)

    @property
    def uri(self) -> str:
        """The canonical URI of this reference."""
        version = f"?versionId={quote(self.version_id, safe='')}" if self.version_id else ""
        return f"s3://{self.bucket}/{quote(self.key, safe='/')}{version}"


def _checked(uri: str) -> str:
    return S3Object.parse(uri).uri


#: A media URI in a wire type: checked and brought to its canonical spelling.
MediaUri = Annotated[str, AfterValidator(_checked)]
