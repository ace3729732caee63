"""The bases of every wire type: frozen, JSON without absent values.

What comes from producers is closed: an unknown field is an error. What readers get of workers and gateways is open:
fields that a later release adds are ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _without_point(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: An integer as JSON knows it: 5.0 is one, even where types are read strictly.
WholeNumber = Annotated[int, BeforeValidator(_without_point)]


class WireModel(BaseModel):
    """A value that crosses a process boundary as JSON. Optional fields that are absent are left out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """Return the canonical JSON of this value."""
        return self.model_dump_json(exclude_none=True, by_alias=True)


class ReadModel(WireModel):
    """A result, event or view. Readers one release older than the writer ignore what they do not know."""

    model_config = ConfigDict(extra="ignore")
