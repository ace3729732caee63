"""Which jobs of a tenant are meant: by status, model and members of their metadata."""

from __future__ import annotations

import json
from typing import Final, Literal, Self

from pydantic import ValidationError, model_validator

from api_stub.contract.error import InvalidJob, explain
from api_stub.contract.job import MAX_METADATA_BYTES, ModelName
from api_stub.contract.status import JobStatus
from api_stub.contract.wire import WireModel

Scalar = str | int | float | bool | None
#: Redis compares numbers as Lua does, as floats: from here on some whole numbers that differ are one.
_NUMBERS_END: Final = 2**53


class JobSelection(WireModel):
    """Jobs that are not final and have all that is given: at least one of these.

    `metadata`: members that a job's metadata must have, equal as JSON: text, numbers below 2^53, true, false or null.
    """

    status: Literal[JobStatus.QUEUED, JobStatus.IN_PROGRESS] | None = None
    model: ModelName | None = None
    metadata: dict[str, Scalar] | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if self.status is None and self.model is None and not self.metadata:
            raise ValueError("at least one of status, model and metadata is required")
        num_bytes = len(json.dumps(self.metadata, ensure_ascii=False).encode())
        if num_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: {num_bytes} bytes of JSON, the limit is {MAX_METADATA_BYTES}")
        for name, value in (self.metadata or {}).items():
            if isinstance(value, int | float) and abs(value) >= _NUMBERS_END:
                raise ValueError(f"metadata: {name}: numbers from 2^53 on cannot be told apart; keep them as text")
        return self


def parse_selection(fields: dict[str, object]) -> JobSelection:
    """Check a selection. Raises InvalidJob that names the field."""
    try:
        return JobSelection.model_validate(fields)
    except ValidationError as error:
        raise InvalidJob(explain(error)) from error
