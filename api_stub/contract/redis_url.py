"""The check of a Redis URL that producer and worker share. The URL may hold a password: no message repeats it."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs, urlsplit

_WAY: Final = "give one address that always leads to the master, a name that moves or a TCP proxy"
_SET_IN_THE_URL: Final = ("password", "username", "db")


def check_redis_url(url: str) -> None:
    """Raise ValueError when `url` names no Redis, or says in its query what belongs before it."""
    _refuse_several(url)
    try:
        parts = urlsplit(url)
        is_redis = parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_redis = False
    # A '#' or '/' in a password cuts the host off: what follows would be printed as the path.
    if not is_redis or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("must be redis://[user:password@]host[:port][/db] or rediss://…")
    for name in _SET_IN_THE_URL:
        if name in parse_qs(parts.query, keep_blank_values=True):
            raise ValueError(f"{name}= does not belong into the query: redis://[user:password@]host[:port][/db]")


def _refuse_several(url: str) -> None:
    """Name what libraries take elsewhere, and the way that works here."""
    scheme, _, rest = url.partition("://")
    if "sentinel" in scheme.lower():
        raise ValueError(f"Redis Sentinel is not supported: {_WAY}")
    hosts = rest.partition("/")[0].rpartition("@")[2]
    if "," in hosts or ";" in hosts or "://" in rest:
        raise ValueError(f"several addresses are not supported: {_WAY}")


def redis_address(url: str) -> str:
    """Return `host:port` of a checked URL, for messages."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"
