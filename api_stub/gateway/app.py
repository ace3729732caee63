"""The ASGI application: routers, errors, middleware, and the gateway's life from start to stop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from api_stub.gateway import problems
from api_stub.gateway.forwarded import Forwarded, TrustedProxies
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.guard import CrossOrigin, Guard
from api_stub.gateway.keys import KeyRing
from api_stub.gateway.metrics import Metrics
from api_stub.gateway.openai import document
from api_stub.gateway.openai import routes as openai_routes
from api_stub.gateway.openai.runner import BatchRunner
from api_stub.gateway.openapi import describe
from api_stub.gateway.remote_media import RemoteRules
from api_stub.gateway.routes import events, jobs, operations, operators, page, uploads
from api_stub.gateway.webhooks.rules import WebhookRules
from api_stub.settings import GatewaySettings

ROUTERS = (
    jobs.router,
    events.router,
    uploads.router,
    openai_routes.router,
    operations.router,
    operators.router,
    page.router,
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
    app.mount("/static", page.PageFiles(directory=page.FILES), name="static")
    describe(app)
    document.describe(app)
    app.add_middleware(Guard, settings=settings, keys=keys, metrics=metrics)
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
