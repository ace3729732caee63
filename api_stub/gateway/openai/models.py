"""Which models may be asked, and what becomes of a completion for a model that no worker serves.

The known names are listed as far as the caller's key names them. A completion waits a while for a worker and then ends
with an error instead of waiting for ever.
"""

from __future__ import annotations

import logging
import time

import redis

from api_stub.contract.error import ErrorCode, ErrorInfo
from api_stub.contract.names import TRAINING_MODEL_NAME, queue_model
from api_stub.contract.status import JobStatus
from api_stub.errors import JobFailed
from api_stub.gateway.access import check_known, unknown_model
from api_stub.gateway.gateway import Gateway
from api_stub.gateway.keys import Caller
from api_stub.gateway.openai.shapes import ModelObject
from api_stub.ledger.rows import Cancelled

logger = logging.getLogger(__name__)


class NoWorker(JobFailed):
    """Raised when nobody has served a completion's model for as long as it may wait. Its job is not waited for."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.code, info.message, info.retryable)
        self.info = info


class ServedOrNot:
    """Looks now and then whether a waiting completion's job is queued for a model that no worker serves.

    Twice in a row, half of the timeout apart, and the job is cancelled; one that `goes_on` stays queued, because a
    repetition finds it.
    """

    def __init__(self, gateway: Gateway, job_id: str, *, goes_on: bool) -> None:
        self._gateway, self._job_id, self._goes_on = gateway, job_id, goes_on
        self._pause_s = gateway.settings.api_no_worker_s / 2
        self._look_at = time.monotonic() + self._pause_s
        self._was_unserved = False

    def left_s(self, most_s: float) -> float:
        """Return how long to wait before the next `look`, `most_s` at most."""
        return max(0.0, min(most_s, self._look_at - time.monotonic()))

    async def look(self) -> None:
        """Look, if it is time. Raises NoWorker."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self._pause_s
        try:
            view = await self._gateway.ledger.view(self._job_id)
            is_unserved = view is not None and view.status is JobStatus.QUEUED and not view.num_workers
            if view is not None and is_unserved and self._was_unserved and await self._ends():
                logger.info(
                    "no worker serves the model",
                    extra={"action": "give_up", "job_id": self._job_id, "model": view.model},
                )
                raise NoWorker(no_worker(view.model, 2 * self._pause_s))
        except redis.RedisError:
            return  # whoever reads the job's events says so
        self._was_unserved = is_unserved

    async def _ends(self) -> bool:
        return self._goes_on or await self._gateway.ledger.cancel(self._job_id) is not Cancelled.FINAL


def no_worker(model: str, timeout_s: float) -> ErrorInfo:
    """Return the error of a completion that no worker has taken."""
    message = (
        f"no worker has served the model {model!r} for {timeout_s:g} s (VISIONQ_API_NO_WORKER_S); "
        "ask again when one does, or hand it in at /v1/jobs, where it waits"
    )
    return ErrorInfo.of(ErrorCode.NO_WORKER, message)


async def known_models(gateway: Gateway, caller: Caller) -> list[ModelObject]:
    """Return the models that the caller may ask, by name."""
    listed = []
    for name in await gateway.queues.models():
        if name != TRAINING_MODEL_NAME and caller.may_see(name):
            adapters = await gateway.queues.adapters(name)
            listed += [name, *(f"{name}:{adapter}" for adapter in adapters)]
    return [ModelObject(id=name) for name in listed if caller.may_use(name)]


async def check_model(gateway: Gateway, caller: Caller, model: str) -> None:
    """Raise Problem (404) for a model that does not exist, for this caller at least."""
    if queue_model(model) == TRAINING_MODEL_NAME or not caller.may_use(model):
        raise unknown_model(f"the model {model[:80]!r} does not exist, or this key may not use it")
    await check_known(gateway, model)
