"""Which models may be asked: the known names, as far as the caller's key names them."""

from __future__ import annotations

from api_stub.gateway.access import check_known, unknown_model
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai.shapes import ModelObject


async def known_models(gateway: Gateway, caller: Caller) -> list[ModelObject]:
    """Return the models that the caller may ask, by name."""
    return [ModelObject(id=name) for name in await gateway.queues.models() if caller.may_use(name)]


async def check_model(gateway: Gateway, caller: Caller, model: str) -> None:
    """Raise Problem (404) for a model that does not exist, for this caller at least."""
    if not caller.may_use(model):
        raise unknown_model(f"the model {model[:80]!r} does not exist, or this key may not use it")
    await check_known(gateway, model)
