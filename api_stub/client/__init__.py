"""The Python API: `Client` for threads, `AsyncClient` for asyncio, over Redis or through a gateway."""

from api_stub.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
