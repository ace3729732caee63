"""How the next token is chosen. Defaults mean greedy decoding."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from api_stub.contract.wire import WholeNumber, WireModel

MAX_STOP_STRINGS = 4

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class SamplingParams(WireModel):
    """Sampling of one job; counts are tokens. An absent `max_new_tokens` or `seed` is filled in at submit."""

    max_new_tokens: WholeNumber | None = Field(default=None, ge=1, le=32_768)
    min_new_tokens: WholeNumber = Field(default=0, ge=0, le=32_768)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: WholeNumber = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: WholeNumber | None = Field(default=None, ge=0, lt=2**63)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10.0)
    stop: tuple[StopString, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
