"""How gateway and worker write a log line as JSON: ts, level, logger, message, then the facts given as `extra`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

#: Attributes that every LogRecord has; whatever else a record carries came through `extra`.
_PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message", "data"}


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """Return what a record carries beside its message."""
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


class JsonFormatter(logging.Formatter):
    """One JSON object per record. `facts`: what a record carries; `redact` is applied to the whole line."""

    def __init__(
        self,
        redact: Callable[[str], str] = str,
        facts: Callable[[logging.LogRecord], Mapping[str, object]] = facts_of,
    ) -> None:
        super().__init__()
        self._redact, self._facts = redact, facts

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._redact(json.dumps(line, default=str, ensure_ascii=False))
