"""What operators do with a model's queue: pause it, let it go on, empty it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from api_stub.contract.job import ModelName
from api_stub.gateway.access import GatewayHere, OperatorHere
from api_stub.gateway.bodies import PurgeReply, QueueReply, answer
from api_stub.ledger.rows import QueueChange

router = APIRouter(prefix="/v1/queues", tags=["operations"])

Model = Annotated[ModelName, Path(description="Name of the model.")]


@router.post("/{model}/pause", response_model=QueueReply)
async def pause_queue(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """Let nobody claim jobs of a model until it is resumed. Running jobs end, submits are taken, deadlines count."""
    return _reply(model, await gateway.ledger.pause(model), paused=True)


@router.post("/{model}/resume", response_model=QueueReply)
async def resume_queue(gateway: GatewayHere, caller: OperatorHere, model: Model) -> Response:
    """Let jobs of a model be claimed again, in their order."""
    return _reply(model, await gateway.ledger.resume(model), paused=False)


@router.post("/{model}/purge", response_model=PurgeReply)
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
