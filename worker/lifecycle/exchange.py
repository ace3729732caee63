"""Makes a running worker serve what operators want: other weights, other adapters. Its jobs notice a pause.

Everything that can fail without touching the engine comes first, while jobs go on: reading, comparing, digests. Then no
job is let in until those inside have ended; the weights are copied into the model's own tensors, another engine proves
itself, and the checkpoint's smoke set must be answered. If anything fails, the former weights are copied back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from api_stub.contract.serving import Serving
from api_stub.contract.wish import Weights, Wish
from worker.errors import CannotStart
from worker.jobs.served import Served
from worker.lifecycle.admission import Admission
from worker.lifecycle.engine_slot import EngineSlot
from worker.models.exchange import check_finite, copy_into, copy_to_host, difference
from worker.models.inputs import LoadedAdapter
from worker.models.loader import LoadedModel, load
from worker.models.manifest import SmokeQuestion, read_checked
from worker.models.served_adapters import read_adapters
from worker.models.source import Source, find_model
from worker.settings import MAX_ADAPTERS, Attention, Dtype, Quantization, WorkerSettings

logger = logging.getLogger(__name__)

#: How long jobs may take to end before the change is put off.
WAIT_S: Final = 600.0


class StartAgain(Exception):
    """Raised for what cannot be exchanged in place: the process must load it anew."""


def wished(settings: WorkerSettings, wish: Wish) -> WorkerSettings:
    """Return the settings under which a worker serves what is wanted. Raises CannotStart for too many adapters."""
    adapters = {name: uri for name, uri in {**settings.adapter_uris, **wish.adapters}.items() if uri}
    if len(adapters) > MAX_ADAPTERS:
        raise CannotStart(f"at most {MAX_ADAPTERS} adapters are served, {len(adapters)} are wanted")
    wanted: dict[str, object] = {"adapters": ",".join(f"{name}={uri}" for name, uri in adapters.items())}
    if wish.weights.source:
        wanted |= {"model": wish.weights.source, "model_revision": ""}
    return settings.model_copy(update=wanted)


def check_digest(wish: Wish, found: str) -> None:
    """Raise CannotStart when the weights that were read are not the wanted ones."""
    if wish.weights.digest and wish.weights.digest != found:
        raise CannotStart(f"{wish.weights.source}: the weights' digest is {found}, wanted is {wish.weights.digest}")


def smoke_questions(settings: WorkerSettings, found: Source) -> Sequence[SmokeQuestion]:
    """Return the smoke set of a checkpoint, after comparing its files with its manifest. Raises CannotStart."""
    folder = found.place if found.adapter is None else found.adapter.folder
    return read_checked(settings.model, folder).smoke if isinstance(folder, Path) else ()


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read while jobs went on; new: None when the weights stay."""

    new: LoadedModel | None
    questions: Sequence[SmokeQuestion]
    adapters: tuple[LoadedAdapter, ...]


class Exchange:
    """Changes what one worker serves. One thread.

    settings: the worker's own, before any wish. weights: those that are loaded. tries: asks the new engine the prompt
    that every worker answers at its start, and the questions; raises what is wrong.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        loaded: LoadedModel,
        weights: Weights,
        slot: EngineSlot,
        admission: Admission,
        served: Served,
        tries: Callable[[Sequence[SmokeQuestion]], None],
    ) -> None:
        self._settings = settings
        self._loaded = loaded
        self._weights = weights
        self._slot = slot
        self._admission = admission
        self._served = served
        self._tries = tries

    def fulfil(self, wish: Wish) -> None:
        """Serve what is wanted.

        Raises CannotStart when that is not possible (then nothing has changed), StartAgain when another process must
        do it, Busy when jobs do not end.
        """
        settings = wished(self._settings, wish)
        read = self._read(settings, wish)
        was_same = read.new is None and _names(read.adapters) == _names(self._loaded.adapters)
        began = time.monotonic()
        if not was_same:
            with self._admission.shut(WAIT_S):
                shut_at = time.monotonic()
                self._exchange(read)
                self._tell(settings, wish, since=time.time())  # before the first job is let in
            facts: dict[str, object] = {"action": "exchange", "model": settings.model, "adapters": settings.adapters}
            facts |= {"waited_s": round(shut_at - began, 2), "pause_s": round(time.monotonic() - shut_at, 2)}
            logger.info("worker serves something else", extra=facts)
        else:
            self._tell(settings, wish, since=self._served.now.since)
        self._weights = wish.weights

    def _tell(self, settings: WorkerSettings, wish: Wish, since: float) -> None:
        self._served.now = Serving(
            checkpoint=self._loaded.checkpoint,
            source=settings.model,
            adapters=_names(self._loaded.adapters),
            since=since,
            number=wish.number,
            scores=wish.weights.scores,
        )

    def _read(self, settings: WorkerSettings, wish: Wish) -> _Read:
        now = self._served.now
        new: LoadedModel | None = None
        questions: Sequence[SmokeQuestion] = ()
        if wish.weights.number != self._weights.number:
            new, questions = self._read_weights(settings, wish)
        checkpoint = now.checkpoint if new is None else new.checkpoint
        adapters = read_adapters(settings, settings.adapter_uris, self._loaded.model, checkpoint)
        return _Read(new, questions, adapters)

    def _read_weights(self, settings: WorkerSettings, wish: Wish) -> tuple[LoadedModel, Sequence[SmokeQuestion]]:
        """Load a checkpoint into host memory, in float32: another default type would change what jobs compute now."""
        found = find_model(settings)
        questions = smoke_questions(settings, found)
        if settings.quantization is not Quantization.NONE:
            raise StartAgain("the weights are quantised")
        if found.adapter is not None and self._loaded.dtype is not torch.float32:
            raise StartAgain("an adapter is merged")
        attention = Attention.AUTO if settings.attention is Attention.FLASH else settings.attention
        host = {"device": "cpu", "dtype": Dtype.FLOAT32, "attention": attention, "adapters": "", "torch_threads": 0}
        new = load(settings.model_copy(update=host))
        check_digest(wish, new.checkpoint)
        if what := difference(self._loaded, new):
            raise StartAgain(f"another {what}")
        check_finite(new, settings.model)
        return new, questions

    def _exchange(self, read: _Read) -> None:
        """Put the weights and adapters into the engine's place, or leave all as it was. No job is inside."""
        former = self._loaded
        kept = copy_to_host(former.model) if read.new is not None else None
        try:
            self._slot.replace(lambda: self._changed(read))
            self._tries(read.questions)
        except Exception as error:
            logger.warning("the former weights are put back", extra={"action": "exchange", "error": str(error)})
            self._restore(former, kept)
            raise CannotStart(str(error) or type(error).__name__) from error

    def _changed(self, read: _Read) -> LoadedModel:
        new = read.new
        if new is not None:
            copy_into(self._loaded.model, new.model.state_dict())
        checkpoint = self._loaded.checkpoint if new is None else new.checkpoint
        self._loaded = replace(self._loaded, checkpoint=checkpoint, adapters=read.adapters)
        return self._loaded

    def _restore(self, former: LoadedModel, kept: Mapping[str, Tensor] | None) -> None:
        def back() -> LoadedModel:
            if kept is not None:
                copy_into(former.model, kept)
            self._loaded = former
            return former

        try:
            self._slot.replace(back)
            self._tries(())
        except BaseException:
            self._slot.give_up()
            raise


def _names(adapters: Sequence[LoadedAdapter]) -> dict[str, str]:
    return {adapter.name: adapter.digest for adapter in adapters}
