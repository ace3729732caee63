"""Which way a client takes: to Redis, or over HTTP to a gateway."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from pydantic import SecretStr

from api_stub.client.redis_transport import AsyncDirectTransport, DirectTransport
from api_stub.client.transport import AsyncTransport, Transport
from api_stub.errors import InvalidSettings
from api_stub.settings import ClientSettings


def settings_of(url: str | None, settings: ClientSettings | None, api_key: str | None) -> ClientSettings:
    """Return the settings of a client: the environment's, unless they are given whole. Raises InvalidSettings."""
    if settings is None:
        settings = ClientSettings.load(None if _is_http(url) else url)
    elif url is not None:
        raise TypeError("give url or settings, not both")
    return settings if api_key is None else settings.model_copy(update={"api_key": SecretStr(api_key)})


def transport_of(url: str | None, settings: ClientSettings) -> Transport:
    """Return what speaks to the gateway or the Redis that is meant."""
    gateway = _gateway_url(url, settings)
    if gateway is None:
        return DirectTransport(settings)
    transport: Transport = _http("sync").HttpTransport(gateway, _key(settings))
    return transport


def async_transport_of(url: str | None, settings: ClientSettings) -> AsyncTransport:
    """`transport_of` for asyncio."""
    gateway = _gateway_url(url, settings)
    if gateway is None:
        return AsyncDirectTransport(settings)
    transport: AsyncTransport = _http("aio").AsyncHttpTransport(gateway, _key(settings))
    return transport


def _gateway_url(url: str | None, settings: ClientSettings) -> str | None:
    """Return the gateway to speak to; None: Redis. A Redis that is named wins over a gateway that is named, too."""
    if url is not None:
        return url if _is_http(url) else None
    return None if "redis_url" in settings.model_fields_set else settings.api_url


def _is_http(url: str | None) -> bool:
    return url is not None and url.startswith(("http://", "https://"))


def _key(settings: ClientSettings) -> str | None:
    return settings.api_key.get_secret_value() or None


def _http(module: str) -> ModuleType:
    """Import by name: most producers speak to Redis and have no httpx."""
    if importlib.util.find_spec("httpx") is None:
        raise InvalidSettings("a gateway is spoken to with httpx, which is not installed: pip install 'visionq[http]'")
    return importlib.import_module(f"api_stub.client.http.{module}")
