"""visionq, producer side: submit caption, VQA and video-QA jobs and follow their answers. Never imports torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from api_stub.client.client import AsyncClient, Client
    from api_stub.errors import JobFailed

__all__ = ["AsyncClient", "Client", "JobFailed"]
_HOMES = {"AsyncClient": "api_stub.client.client", "Client": "api_stub.client.client", "JobFailed": "api_stub.errors"}


def __getattr__(name: str) -> object:
    """Import on first use: a Celery consumer that only meets a JobFailed should not load boto3."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
