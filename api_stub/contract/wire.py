"""The bases of every wire type: frozen, JSON without absent values.

What comes from producers is closed: an unknown field is an error. What readers get of workers and gateways is open:
fields that a later release adds are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict

#: Objects and lists within each other, of one field. Readers stop at 200, of views in which metadata is a part.
MAX_DEPTH: Final = 128


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

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        """Leave out absent values, as the JSON does."""
        return ((name, value) for name, value in super().__repr_args__() if value is not None)


def check_depth(name: str, value: object) -> None:
    """Raise ValueError for a JSON value, of the field `name`, that is nested deeper than readers can follow."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: nested {depth} deep, the limit is {MAX_DEPTH}")
