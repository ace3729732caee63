"""Takes secrets out of text before it is written: values that the process was given, and what looks like one.

The second line of defence: nothing should put them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, unquote

HIDDEN: Final = "***"
#: Shorter values would black out ordinary words.
MIN_SECRET_CHARS: Final = 6

#: Credentials of a URL, be it a user alone, and a password in its query; what signs a presigned URL (AWS Signature
#: Version 4 and 2); bearer tokens.
_PATTERNS: Final = (
    (re.compile(r"(?<=://)[^/\s\"']+(?=@)"), HIDDEN),
    (re.compile(r"([?&]password=)[^&#\s\"'\\]+", re.I), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"((?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature)(?:=|%3D))[^&\s\"'\\]+", re.I
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bBearer )[\w.~+/=-]+", re.I), rf"\1{HIDDEN}"),
)


class Redactor:
    """Hides `secrets`, as they are and as they look inside a URL or a JSON string, and everything of a known form."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        for pattern, hidden in _PATTERNS:
            text = pattern.sub(hidden, text)
        return text


def _forms(secret: str) -> set[str]:
    plain = unquote(secret)
    forms = {secret, plain, quote(plain, safe="")}
    forms |= {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms} | {json.dumps(plain)[1:-1]}
    return {form for form in forms if len(form) >= MIN_SECRET_CHARS}
