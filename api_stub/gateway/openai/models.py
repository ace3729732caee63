"""Which models may be asked: those with a queue or a worker, those the operator names, those of the caller's key."""

from __future__ import annotations

from http import HTTPStatus

from api_stub.contract import names
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai.shapes import ModelObject
from api_stub.gateway.problems import FieldError, Problem


async def known_models(gateway: Gateway, caller: Caller) -> list[ModelObject]:
    """Return the models that the caller may ask, by name."""
    found = {*await gateway.queues.models(), *gateway.settings.known_models}
    if caller.models is not None:
        found = set(caller.models)
    return [ModelObject(id=name) for name in sorted(found)]


async def check_model(gateway: Gateway, caller: Caller, model: str) -> None:
    """Raise Problem (404) for a model that does not exist, for this caller at least."""
    if not await _is_known(gateway, caller, model):
        message = f"the model {model[:80]!r} does not exist, or this key may not use it"
        errors = [FieldError(field="model", message=message)]
        raise Problem(HTTPStatus.NOT_FOUND, "model_not_found", message, errors=errors)


async def _is_known(gateway: Gateway, caller: Caller, model: str) -> bool:
    if not names.is_model_name(model):
        return False
    if caller.models is not None:
        return model in caller.models
    if model in gateway.settings.known_models:
        return True
    return bool(await gateway.commands.exists(names.depth_key(model), names.workers_key(model)))
