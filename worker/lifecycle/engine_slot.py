"""The engine of a worker, which can be replaced by another one while no job is inside.

A new engine proves itself against the model's own `generate`, records its steps and begins with empty caches, so that
nothing of the former weights can be left in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from worker.engine.batch import PrefixStats, VisionStats
from worker.engine.engine import Engine
from worker.engine.request import GenerationRequest, RequestOutput
from worker.errors import EngineDead
from worker.models.loader import LoadedModel

STOP_TIMEOUT_S: Final = 10.0


class EngineSlot:
    """One engine after the other, for one model. Any thread; `replace` while nobody else asks anything.

    make: returns a new engine for a loaded model. Raises what it raises.
    """

    def __init__(self, make: Callable[[LoadedModel], Engine], loaded: LoadedModel) -> None:
        self._make = make
        self._engine: Engine | None = make(loaded)
        self._is_given_up = False

    def replace(self, change: Callable[[], LoadedModel]) -> None:
        """Stop the engine, let `change` change the model, start another engine for what it returns.

        Raises what `change` and the new engine raise. Then there is no engine until this succeeds, or `give_up`.
        """
        former, self._engine = self._engine, None
        if former is not None:
            former.stop(STOP_TIMEOUT_S)
            if former.is_alive:
                self._engine = former
                raise EngineDead("the engine did not stop")
            del former  # its caches are free before the next engine takes its own
            gc.collect()
        engine = self._make(change())
        engine.start()
        self._engine = engine

    def give_up(self) -> None:
        """Note that there will be no engine any more: the process must end."""
        self._is_given_up = True

    def start(self) -> None:
        """Start the engine's thread."""
        self._present.start()

    def stop(self, timeout_s: float) -> None:
        """Stop the engine, if there is one."""
        if (engine := self._engine) is not None:
            engine.stop(timeout_s)

    def submit(self, request: GenerationRequest) -> None:
        """Hand a request to the engine. Raises what `Engine.submit` raises."""
        self._present.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request between two steps; an unknown one is left alone."""
        if (engine := self._engine) is not None:
            engine.cancel(request_id)

    def generate(self, requests: Sequence[GenerationRequest], timeout_s: float) -> Iterator[RequestOutput]:
        """Return outputs as they come. Raises what `Engine.generate` raises."""
        return self._present.generate(requests, timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs, or another engine is on its way."""
        engine = self._engine
        return not self._is_given_up if engine is None else engine.is_alive

    @property
    def last_step_at(self) -> float:
        """Monotonic time of the engine's last sign of life; 0 while there is no engine."""
        engine = self._engine
        return 0.0 if engine is None else engine.last_step_at

    @property
    def num_running(self) -> int:
        """Requests that are decoding."""
        engine = self._engine
        return 0 if engine is None else engine.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that are submitted and not yet prefilled."""
        engine = self._engine
        return 0 if engine is None else engine.num_waiting

    @property
    def num_preempted(self) -> int:
        """How often a request of this engine gave its KV space up."""
        engine = self._engine
        return 0 if engine is None else engine.num_preempted

    def kv_usage(self) -> float:
        """Return the share of KV space that requests hold, 0…1."""
        engine = self._engine
        return 0.0 if engine is None else engine.kv_usage()

    def prefix_stats(self) -> PrefixStats:
        """Return counts of this engine's prefix cache."""
        engine = self._engine
        return PrefixStats() if engine is None else engine.prefix_stats()

    def vision_stats(self) -> VisionStats:
        """Return counts of this engine's vision cache."""
        engine = self._engine
        return VisionStats() if engine is None else engine.vision_stats()

    @property
    def _present(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise EngineDead("the engine is being replaced")
        return engine
