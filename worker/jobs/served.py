"""What the worker serves at the moment, for all that names it: claims, results, beats. Changed between jobs only."""

from __future__ import annotations

from collections.abc import Callable

from api_stub.contract.names import split_model
from api_stub.contract.serving import Serving
from worker.errors import InvalidRequest, ModelMismatch


class NotServedYet(Exception):
    """Raised for an adapter that this worker does not serve yet, and others may."""


class Served:
    """The serving of one worker that serves the model name `model`. Any thread; `now` changes as a whole.

    is_wanted: whether operators want an adapter served; asked about one that is not.
    """

    def __init__(self, model: str, serving: Serving, is_wanted: Callable[[str], bool] = lambda _adapter: False) -> None:
        self.model = model
        self.now = serving
        self._is_wanted = is_wanted

    def adapter_of(self, requested: str) -> str:
        """Return the adapter that a job's `model` names, empty for the base.

        Raises ModelMismatch for another model, InvalidRequest for an adapter that is not served, NotServedYet for one
        that will be.
        """
        model, adapter = split_model(requested)
        if model != self.model:
            raise ModelMismatch(f"model: the job says {requested!r}, its queue serves {self.model!r}")
        if adapter and adapter not in self.now.adapters:
            if self._is_wanted(adapter):
                raise NotServedYet
            raise InvalidRequest(f"model: no adapter {adapter!r} of {model!r} is served")
        return adapter

    def checkpoint_of(self, adapter: str) -> str | None:
        """Return the digest of the weights that answer: of the base, and of the adapter behind a `+`."""
        serving = self.now
        digest = f"{serving.checkpoint}+{serving.adapters[adapter]}" if adapter else serving.checkpoint
        return digest or None
