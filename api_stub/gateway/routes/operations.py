"""For operators: health, metrics, queues (look, pause, resume, purge), and the playground's page.

Health takes no key. Metrics without one are of this process alone; a key adds its own queues, an operator's everything.
The playground is a page of plain files that uses the public API and nothing else.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Final

import redis
from fastapi import APIRouter, Response
from fastapi import Path as PathParameter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from api_stub.contract.job import ModelName
from api_stub.contract.promotion import NotBetter, Promotion
from api_stub.contract.wire import WireModel
from api_stub.contract.wish import NothingToChange, Wish
from api_stub.errors import InvalidRequest
from api_stub.gateway.access import CallerHere, GatewayHere, MaybeCaller, OperatorHere
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.problems import Problem
from api_stub.gateway.queues import QueueView
from api_stub.gateway.schemas import ModelReply, PurgeReply, QueueReply, answer
from api_stub.ledger import writable
from api_stub.ledger.rows import QueueChange

logger = logging.getLogger(__name__)

#: A busy loop may take its time; whoever asks mostly waits no longer himself.
PROBE_S: Final = 3.0

router = APIRouter(tags=["operations"])

#: Previews are made in the browser: pictures from data, clips from files the user chose.
POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; media-src blob:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'"
)


class Health(WireModel):
    """`ok`, or what is missing."""

    status: str


class QueueList(WireModel):
    """All queues, by model name."""

    queues: tuple[QueueView, ...]


@router.get("/v1/queues", response_model_exclude_none=True)
async def list_queues(gateway: GatewayHere, caller: CallerHere) -> QueueList:
    """Tell of each known model the depth of its queue (a key: its own jobs), its workers and whether it is paused."""
    return QueueList(queues=tuple(await gateway.queues.views(caller)))


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """Tell that the process runs."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(gateway: GatewayHere, response: Response) -> Health:
    """Tell whether jobs can be taken: Redis takes writes."""
    try:
        await writable.async_probe(gateway.prober, PROBE_S)
    except redis.RedisError as error:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Health(status=writable.reason(error))
    return Health(status="ok")


@router.head("/metrics", response_class=Response, include_in_schema=False)
@router.get("/metrics", response_class=Response)
async def metrics(gateway: GatewayHere, caller: MaybeCaller) -> Response:
    """Give the metrics in Prometheus' text format; without the queues' depths while Redis is away.

    Without a key: this process' requests and errors. A key adds the depths of its own queues, an operator's key those
    of all tenants and what was handed in.
    """
    try:
        depths = {queue.model: queue.depth for queue in await gateway.queues.views(caller)} if caller else {}
    except redis.RedisError as error:
        logger.warning("queue depths not read", extra={"action": "metrics", "error": type(error).__name__})
        depths = {}
    gateway.metrics.readers.set(gateway.broadcaster.num_readers)
    return Response(
        gateway.metrics.exposition(depths, is_operator=caller is not None and caller.is_operator),
        media_type=CONTENT_TYPE_LATEST,
    )


queues_router = APIRouter(prefix="/v1/queues", tags=["operations"])

Model = Annotated[ModelName, PathParameter(description="Name of the model.")]


@queues_router.post("/{model}/pause", response_model=QueueReply)
async def pause_queue(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """Let nobody claim jobs of a model until it is resumed. Running jobs end, submits are taken, deadlines count."""
    return _reply(model, await gateway.ledger.pause(model), paused=True)


@queues_router.post("/{model}/resume", response_model=QueueReply)
async def resume_queue(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """Let jobs of a model be claimed again, in their order."""
    return _reply(model, await gateway.ledger.resume(model), paused=False)


@queues_router.post("/{model}/purge", response_model=PurgeReply)
async def purge_queue(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """End all jobs of a model that are queued now, of all tenants, as cancelled. Running ones go on."""
    return answer(PurgeReply(model=model, cancelled=await gateway.ledger.purge(model)))


def _reply(model: str, change: QueueChange, *, paused: bool) -> Response:
    reply = QueueReply(
        model=model,
        paused=paused,
        changed=change.is_changed,
        depth=change.depth,
        num_workers=change.num_workers,
    )
    return answer(reply)


models_router = APIRouter(prefix="/v1/models", tags=["operations"])


@models_router.post("/{model}/promote", response_model=ModelReply, status_code=HTTPStatus.ACCEPTED)
async def promote_model(gateway: GatewayHere, caller: OperatorHere, model: Model, promotion: Promotion) -> Response:
    """Have all workers of a model serve another checkpoint, one after the other; no job fails for it.

    Each answers the checkpoint's smoke set first; the first that cannot brings all back. With `if_better` only if
    `record` is better in that metric than `baseline`; else 409.
    """
    served = {serving.checkpoint for serving in (await gateway.ledger.serving(model)).values()}
    try:
        weights = promotion.weights(served)
        wish = await gateway.ledger.change_wish(model, lambda wish: wish.promoted(weights))
    except (NotBetter, NothingToChange) as error:
        raise Problem(HTTPStatus.CONFLICT, "not_promoted", str(error)) from error
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return await _model_reply(gateway, model, wish)


@models_router.post("/{model}/rollback", response_model=ModelReply, status_code=HTTPStatus.ACCEPTED)
async def roll_model_back(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """Have all workers of a model serve the checkpoint before the last promotion again."""
    try:
        wish = await gateway.ledger.change_wish(model, Wish.rolled_back)
    except NothingToChange as error:
        raise Problem(HTTPStatus.CONFLICT, "not_promoted", str(error)) from error
    return await _model_reply(gateway, model, wish)


async def _model_reply(gateway: Gateway, model: str, wish: Wish) -> Response:
    return answer(ModelReply.of(model, wish, await gateway.ledger.serving(model)), HTTPStatus.ACCEPTED)


FILES: Final = Path(__file__).parent.parent / "static"

page_router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's files; a browser asks whether they have changed instead of trusting an old copy."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@page_router.head("/")
@page_router.get("/")
async def playground() -> Response:
    """Return the page."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return FileResponse(FILES / "index.html", headers=headers)
