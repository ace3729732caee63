"""What operators want the workers of a model to serve: one JSON value per model, at `names.wanted_key`.

Each change is a new value with the next number. Workers fulfil the newest one by one, and tell its number in their
`Serving`. No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import ValidationError

from api_stub.contract.wire import ReadModel


class NothingToChange(ValueError):
    """Raised for a change that cannot be made, with the reason."""


class Weights(ReadModel):
    """The weights that are to be served.

    number: of the wish that first wanted them, since a place may have other weights later. source: as VISIONQ_MODEL
    would name them; empty: what each worker's own VISIONQ_MODEL says. digest: they are served only if they have it;
    empty: the first worker that reads them fills it in. scores: of their evaluation, as told.
    """

    number: int = 0
    source: str = ""
    digest: str = ""
    scores: Mapping[str, float] = {}


class Wish(ReadModel):
    """What is wanted of all workers of one model name.

    number: grows with every change; 0: nobody has wanted anything. former: the weights that `rollback` brings back.
    adapters: name → where it is, beside those of VISIONQ_ADAPTERS; empty: not to be served. before: the wish that holds
    again when a worker cannot fulfil this one. is_fulfilled: a worker does. problem: why the last one was given up.
    at: Unix time.
    """

    number: int = 0
    weights: Weights = Weights()
    former: Weights | None = None
    adapters: Mapping[str, str] = {}
    before: Wish | None = None
    is_fulfilled: bool = False
    problem: str | None = None
    at: float = 0.0

    def promoted(self, weights: Weights) -> Wish:
        """Want other weights. Raises NothingToChange."""
        if weights.digest and (weights.source, weights.digest) == (self.weights.source, self.weights.digest):
            raise NothingToChange(f"checkpoint: {weights.source} is promoted already")
        numbered = weights.model_copy(update={"number": self.number + 1})
        return self._next(weights=numbered, former=self._proven.weights if self._proven else None)

    def rolled_back(self) -> Wish:
        """Want the weights before the last promotion. Raises NothingToChange."""
        if self.former is None:
            raise NothingToChange("nothing to roll back to: no checkpoint was promoted before")
        return self._next(weights=self.former, former=self.weights)

    def with_adapter(self, name: str, uri: str) -> Wish:
        """Want an adapter served, or no longer for an empty `uri`."""
        return self._next(adapters={**self.adapters, name: uri})

    def failed(self, problem: str) -> Wish:
        """Want what was wanted before this, because a worker could not fulfil it. Raises NothingToChange."""
        if self.before is None:
            raise NothingToChange("there was no wish before")
        return self.before.model_copy(
            update={
                "number": self.number + 1,
                "before": None,
                "is_fulfilled": True,
                "problem": problem,
                "at": time.time(),
            }
        )

    def fulfilled(self, digest: str) -> Wish:
        """Note that a worker serves what is wanted, and the digest of promoted weights. The number stays."""
        weights = self.weights.model_copy(update={"digest": digest if self.weights.source else ""})
        return self.model_copy(update={"is_fulfilled": True, "weights": weights})

    @property
    def _proven(self) -> Wish | None:
        """The newest wish that a worker has fulfilled, or the first one, which nobody had to."""
        return self if self.is_fulfilled or not self.number else self.before

    def _next(self, **changed: object) -> Wish:
        before = self._proven and self._proven.model_copy(update={"before": None})
        common: dict[str, object] = {"number": self.number + 1, "before": before, "is_fulfilled": False}
        common |= {"problem": None, "at": time.time()}
        return self.model_copy(update=common | changed)


def read_wish(text: str | None) -> Wish:
    """Return the wish; the first one, number 0, for what is absent or cannot be read."""
    try:
        return Wish.model_validate_json(text) if text else Wish()
    except ValidationError:
        return Wish()
