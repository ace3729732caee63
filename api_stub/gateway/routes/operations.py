"""For operators: health, metrics and queues.

Health takes no key. Metrics without one are of this process alone; a key adds its own queues, an operator's everything.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Final

import redis
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api_stub.contract.wire import WireModel
from api_stub.gateway.access import CallerHere, GatewayHere, MaybeCaller
from api_stub.gateway.queues import QueueView
from api_stub.ledger import writable

logger = logging.getLogger(__name__)

#: A busy loop may take its time; whoever asks mostly waits no longer himself.
PROBE_S: Final = 3.0

router = APIRouter(tags=["operations"])


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
        logger.warning("no queue depths", extra={"action": "metrics", "error": type(error).__name__})
        depths = {}
    gateway.metrics.readers.set(gateway.hub.num_readers)
    return Response(
        gateway.metrics.exposition(depths, is_operator=caller is not None and caller.is_operator),
        media_type=CONTENT_TYPE_LATEST,
    )
