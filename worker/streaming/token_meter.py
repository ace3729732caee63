"""Counts the tokens that leave the engine and the time between them, in the terms of observability/metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.request import Finish, RequestOutput
from worker.observability.metrics import Metrics


@dataclass(slots=True)
class _Counted:
    num_tokens: int
    last_at: float


class TokenMeter:
    """Counts tokens and the time between them. `count` belongs to one thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counted: dict[str, _Counted] = {}

    def count(self, outputs: Sequence[RequestOutput], at: float) -> None:
        """Count what one engine step generated. `at`: the monotonic time at which its outputs left the engine."""
        for output in outputs:
            self._count(output, at)

    def _count(self, output: RequestOutput, at: float) -> None:
        counted = self._counted.get(output.request_id)
        if counted is None:
            counted = self._counted[output.request_id] = _Counted(0, at)
        elif output.num_tokens:
            # Tokens that were held back arrive together.
            gap_s = (at - counted.last_at) / output.num_tokens
            for _ in range(output.num_tokens):
                self._metrics.inter_token_latency.observe(gap_s)
        if output.num_tokens:
            counted.num_tokens += output.num_tokens
            counted.last_at = at
            self._metrics.generation_tokens.inc(output.num_tokens)
        if output.finish is not None:
            del self._counted[output.request_id]
            self._end(output.finish, counted)

    def _end(self, finish: Finish, counted: _Counted) -> None:
        if finish.num_completion_tokens:
            # Some tokens make no text of their own, the one that ends an answer for instance.
            self._metrics.generation_tokens.inc(max(0, finish.num_completion_tokens - counted.num_tokens))
            self._metrics.prompt_tokens.inc(finish.num_prompt_tokens)
