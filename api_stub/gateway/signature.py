"""Signatures of the Standard Webhooks specification: HMAC-SHA256 over `id.timestamp.body`, one per secret.

A secret is `whsec_` and 24 to 64 bytes in base64. Several secrets sign side by side, so that one can be replaced.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "whsec_"
MIN_BYTES: Final = 24
MAX_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Secret:
    """A signing key."""

    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Secret:
        """Read `whsec_…`. Raises ValueError that repeats none of it."""
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("a webhook secret is whsec_ and base64") from error
        if not text.startswith(PREFIX) or not MIN_BYTES <= len(key) <= MAX_BYTES:
            raise ValueError(f"a webhook secret is {PREFIX} and {MIN_BYTES} to {MAX_BYTES} bytes in base64")
        return cls(key)


def parse_secrets(text: str) -> tuple[Secret, ...]:
    """Read secrets between commas or spaces. Raises ValueError."""
    return tuple(Secret.parse(word) for word in text.replace(",", " ").split())


def signed_headers(delivery_id: str, timestamp: int, body: bytes, secrets: Sequence[Secret]) -> dict[str, str]:
    """Return the three headers of a delivery. `timestamp`: seconds since 1970, of this try."""
    content = f"{delivery_id}.{timestamp}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(secret.key, content, hashlib.sha256)).decode() for secret in secrets)
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
