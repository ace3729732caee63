"""How the next token is chosen. What is absent means greedy decoding, as the checkpoint's generation config has it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from api_stub.contract.wire import WholeNumber, WireModel

MAX_STOP_STRINGS = 4

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class SamplingParams(WireModel):
    """Sampling of one job; counts are tokens. An absent `max_new_tokens` or `seed` is filled in at submit.

    An absent `min_new_tokens`, `repetition_penalty` or `stop` is left to the worker: the checkpoint's generation config
    counts, else the neutral value. A neutral value that is given (`0`, `1.0`, `[]`) beats the checkpoint's.
    """

    max_new_tokens: WholeNumber | None = Field(default=None, ge=1, le=32_768)
    min_new_tokens: WholeNumber | None = Field(default=None, ge=0, le=32_768)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: WholeNumber = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: WholeNumber | None = Field(default=None, ge=0, lt=2**63)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10.0)
    stop: tuple[StopString, ...] | None = Field(default=None, max_length=MAX_STOP_STRINGS)

    def filled(self) -> SamplingParams:
        """Return it with neutral values for absent ones, as release 0.1.0 wrote it: it knew no checkpoint defaults."""
        return self.model_copy(update={name: value for name, value in NEUTRAL.items() if getattr(self, name) is None})

    def named_neutral(self) -> list[str]:
        """Return the fields whose neutral value was given, known by another that is absent; 0.1.0 wrote them all."""
        given = {name: getattr(self, name) for name in NEUTRAL}
        return [name for name, value in NEUTRAL.items() if None in given.values() and given[name] == value]


#: What the fields that a checkpoint may have a default for mean when nobody says anything.
NEUTRAL: Final[Mapping[str, object]] = MappingProxyType({"min_new_tokens": 0, "repetition_penalty": 1.0, "stop": ()})
