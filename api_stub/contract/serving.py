"""What one worker of a model serves, as it tells with every beat: JSON in the HASH `names.serves_key`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from api_stub.contract.wire import ReadModel


class Serving(ReadModel):
    """The weights and adapters of one worker.

    checkpoint: digest of the weights, of a base and an adapter merged into it joined by `+`. source: where they are, as
    VISIONQ_MODEL would name them. adapters: digests of the adapters that jobs may name. since: Unix time at which it
    began to serve this. number: of the operators' wish that this fulfils, 0 without one. scores: of an evaluation of
    these weights, where one was given.
    """

    checkpoint: str = ""
    source: str = ""
    adapters: Mapping[str, str] = {}
    since: float = 0.0
    number: int = 0
    scores: Mapping[str, float] = {}


def read_all_serving(told: Mapping[str, str]) -> dict[str, Serving]:
    """Return what workers told, by their names, in order; what cannot be read is left out."""
    found = ((worker, _read(text)) for worker, text in sorted(told.items()))
    return {worker: serving for worker, serving in found if serving is not None}


def _read(text: str) -> Serving | None:
    try:
        return Serving.model_validate_json(text)
    except ValidationError:
        return None
