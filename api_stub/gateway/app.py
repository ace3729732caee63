"""The ASGI application: routers, errors, middleware, life from start to stop; and the process that runs it.

The process: uvicorn, logs as JSON lines, an end that is bounded although streams are open.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from api_stub.contract.log_line import JsonFormatter
from api_stub.gateway import problems
from api_stub.gateway.api_docs import describe
from api_stub.gateway.forwarded import Forwarded, TrustedProxies
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import KeyRing, check_host
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.middleware import CrossOrigin, GatewayMiddleware
from api_stub.gateway.openai import api_docs
from api_stub.gateway.openai import routes as openai_routes
from api_stub.gateway.openai.batches.runner import BatchRunner
from api_stub.gateway.remote_media import RemoteRules
from api_stub.gateway.routes import jobs, operations, uploads
from api_stub.gateway.webhooks.sender import WebhookRules
from api_stub.settings import GatewaySettings

ROUTERS = (
    jobs.router,
    jobs.events_router,
    uploads.router,
    openai_routes.router,
    operations.router,
    operations.queues_router,
    operations.models_router,
    operations.page_router,
)


def create_app(settings: GatewaySettings, keys: KeyRing) -> FastAPI:
    """Make the application. Its gateway is `app.state.gateway` while it runs."""
    metrics = Metrics()
    proxies = TrustedProxies.load(settings)
    for rules in (WebhookRules, RemoteRules):
        rules.load(settings)  # a wrong setting is told before anything starts

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None, None]:
        app.state.gateway = await Gateway.open(settings, keys, metrics)
        batches = BatchRunner(app.state.gateway)
        batches.start()
        try:
            yield
        finally:
            await batches.close()
            await app.state.gateway.close()

    # No docs_url: its page loads scripts from elsewhere. A redirect would name the host that a proxy asked for.
    app = FastAPI(
        title="visionq",
        version=version("visionq"),
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/static", operations.PageFiles(directory=operations.FILES), name="static")
    describe(app)
    api_docs.describe(app)
    app.add_middleware(GatewayMiddleware, settings=settings, keys=keys, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CrossOrigin,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # those asked for are named: OpenAI's client sends a dozen of its own
            expose_headers=["Location", "Retry-After", "Preference-Applied", "WWW-Authenticate", "X-Should-Retry"],
        )
    app.add_middleware(Forwarded, proxies=proxies)
    return app


class GatewayServer(uvicorn.Server):
    """A uvicorn server that tells its event streams to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    @property
    def gateway(self) -> Gateway:
        """The gateway; there is one once the server has started."""
        gateway: Gateway = self._app.state.gateway
        return gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: no new connections, streams end, other requests get their time."""
        gateway: Gateway | None = getattr(self._app.state, "gateway", None)
        if gateway is not None:
            gateway.broadcaster.close_readers()
        await super().shutdown(sockets)


def serve(settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM. Main thread only. Raises InvalidSettings."""
    keys = KeyRing.load(settings)
    check_host(settings, keys)
    _log_to_stderr(settings.log_level)
    # uvicorn raises the signal again once it has stopped, so that whoever was there before hears of it, too.
    signal.signal(signal.SIGTERM, _leave)
    server_of(settings, keys).run()


def server_of(settings: GatewaySettings, keys: KeyRing) -> GatewayServer:
    """Make the server of a gateway; it takes its port when it is run."""
    app = create_app(settings, keys)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        access_log=False,  # ours says less: no query, no address
        log_config=None,
        server_header=False,
        proxy_headers=False,  # `forwarded` reads them, the prefix included
        timeout_keep_alive=settings.api_keep_alive_s,
        timeout_graceful_shutdown=max(1, round(settings.api_stop_s)),
    )
    return GatewayServer(config, app)


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("kombu", "botocore", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
