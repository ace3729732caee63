"""Where the time of the engine's steps goes, for whoever wants to know.

An engine without a recorder gets `StepClock`, which does nothing. On a GPU kernels run behind Python: what they take is
booked where it waits for them, in `sample`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from worker.engine.batch import Chunk


class StepStage(StrEnum):
    """Parts of a step, in order.

    open: vision and embedding of new prompts. schedule: choosing what to feed. model: the forward. sample: choosing
    tokens. detokenise: text, ends, outputs. hand_over: the outbox.
    """

    OPEN = "open"
    SCHEDULE = "schedule"
    MODEL = "model"
    SAMPLE = "sample"
    DETOKENISE = "detokenise"
    HAND_OVER = "hand_over"


@dataclass(slots=True)
class Step:
    """What one step fed and what its stages took.

    num_streams: requests fed one token. num_prompt_tokens: tokens of prompts beside them. num_entries: KV entries that
    the streams had before. at_s: its beginning, seconds of `time.perf_counter`. cpu_s: seconds that the engine thread
    itself computed, which other threads and processes leave alone.
    """

    at_s: float
    num_streams: int = 0
    num_prompt_tokens: int = 0
    num_entries: int = 0
    stage_s: dict[StepStage, float] = field(default_factory=dict)
    cpu_s: dict[StepStage, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        return sum(self.stage_s.values())


class StepClock:
    """Called by the engine thread at the end of each stage; keeps nothing."""

    def begin(self) -> None:
        """A step begins."""

    def feed(self, chunks: Sequence[Chunk]) -> None:
        """The step's batch is known and not yet fed."""

    def lap(self, stage: StepStage) -> None:
        """A stage has ended."""


class StepTimes(StepClock):
    """Keeps every step. Written by the engine thread; read it when the engine is idle or has stopped."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._lapped_at = self._cpu_at = 0.0

    def begin(self) -> None:
        self._lapped_at, self._cpu_at = time.perf_counter(), time.thread_time()
        self.steps.append(Step(self._lapped_at))

    def feed(self, chunks: Sequence[Chunk]) -> None:
        step = self.steps[-1]
        for chunk in chunks:
            if chunk.request.is_decoding:
                step.num_streams += 1
                step.num_entries += chunk.request.num_cached_tokens
            else:
                step.num_prompt_tokens += chunk.num_tokens
        # What the looking took is nobody's.
        self._lapped_at, self._cpu_at = time.perf_counter(), time.thread_time()

    def lap(self, stage: StepStage) -> None:
        now, cpu = time.perf_counter(), time.thread_time()
        step = self.steps[-1]
        step.stage_s[stage] = now - self._lapped_at
        step.cpu_s[stage] = cpu - self._cpu_at
        self._lapped_at, self._cpu_at = now, cpu
