"""Whether Redis takes writes, asked without changing anything, and in words for an operator why not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import redis
import redis.asyncio

from api_stub.contract import names
from api_stub.ledger.pools import IsSentinel
from api_stub.ledger.verdicts import code_of

#: By the code of the refusal.
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "READONLY": "is read-only, a replica",
        "MASTERDOWN": "is a replica without its master",
        "OOM": "is full",
        "LOADING": "is loading its data",
        "NOREPLICAS": "has fewer replicas than it wants for a write",
        "MISCONF": "cannot write its files",
        "BUSY": "is busy with a script",
        "NOPERM": "does not let this user write",
    }
)
#: A write that needs memory, and changes nothing: it sets a key only where there is one, and nobody makes this one.
_PROBE: Final = ("SET", names.PROBE_KEY, "", "XX", "PX", 1)


def probe(client: redis.Redis) -> None:
    """Try a write. Raises redis.RedisError, which `reason` puts into words."""
    client.execute_command(*_PROBE)  # type: ignore[no-untyped-call]


async def async_probe(client: redis.asyncio.Redis, timeout_s: float) -> None:
    """`probe` within `timeout_s`, whatever the client's own timeouts are."""
    try:
        async with asyncio.timeout(timeout_s):
            await client.execute_command(*_PROBE)  # type: ignore[no-untyped-call]
    except TimeoutError as error:
        raise redis.TimeoutError(f"no answer within {timeout_s} s") from error


def reason(error: redis.RedisError) -> str:
    """Return why Redis takes no writes: `redis is full (OOM)`."""
    code = code_of(error)
    if code is not None:
        return f"redis {REASONS.get(code, 'refuses writes')} ({code})"
    if isinstance(error, IsSentinel):
        return f"redis cannot be used: {error}"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return "redis does not answer"
    return f"redis cannot be used: {type(error).__name__}"
