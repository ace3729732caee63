"""Log lines: JSON (one object per line) or text, on stderr, without secrets.

Facts go into `extra`; prompts, media and credentials never do. Lines written by a job's thread get the job's id and
attempt. Lines of libraries, warnings and unhandled exceptions of threads have the same format. `Redactor` is the second
line of defence: it removes the process's own secrets from a text, and whatever has the form of a credential.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Final
from urllib.parse import quote, unquote

from api_stub.contract.log_line import JsonFormatter, facts_of
from worker.settings import LogFormat

logger = logging.getLogger(__name__)

HIDDEN: Final = "***"
#: Shorter values would redact ordinary words.
MIN_SECRET_CHARS: Final = 6

#: Credentials of a URL, also a user alone, and a password in its query; signatures of presigned URLs (AWS Signature
#: Version 4 and 2); bearer tokens.
_PATTERNS: Final = (
    (re.compile(r"(?<=://)[^/\s\"']+(?=@)"), HIDDEN),
    (re.compile(r"([?&]password=)[^&#\s\"'\\]+", re.I), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"((?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature)(?:=|%3D))[^&\s\"'\\]+", re.I
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bBearer )[\w.~+/=-]+", re.I), rf"\1{HIDDEN}"),
)

#: Loggers that are limited to warnings: Celery logs every task at INFO, and a job has two lines of its own.
_VERBOSE: Final = ("celery.worker.strategy", "celery.app.trace", "kombu", "botocore", "urllib3", "transformers")


class Redactor:
    """Redacts `secrets`, also as encoded in a URL or a JSON string, and everything of a known form."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets for form in _forms(secret)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        for pattern, hidden in _PATTERNS:
            text = pattern.sub(hidden, text)
        return text


def _forms(secret: str) -> set[str]:
    plain = unquote(secret)
    forms = {secret, plain, quote(plain, safe="")}
    forms |= {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms} | {json.dumps(plain)[1:-1]}
    return {form for form in forms if len(form) >= MIN_SECRET_CHARS}


_job: ContextVar[dict[str, object] | None] = ContextVar("job", default=None)


@contextmanager
def job_context(job_id: str, attempt: int) -> Iterator[None]:
    """A context in which the lines of this thread get a job's id and attempt."""
    token = _job.set({"job_id": job_id, "attempt": attempt})
    try:
        yield
    finally:
        _job.reset(token)


class TextFormatter(logging.Formatter):
    """Time, level, message and the facts as key=value, for a person at a terminal."""

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        facts = "".join(f" {key}={value}" for key, value in job_facts(record).items())
        line = f"{at} {record.levelname:<7} {record.getMessage()}{facts}"
        return self._redact(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class CountingHandler(logging.Handler):
    """Calls `count` with level, action and fixed phrase of every line that has an action, and of all warnings."""

    def __init__(self, count: Callable[[str, str, str], None]) -> None:
        super().__init__(logging.INFO)
        self._count = count

    def emit(self, record: logging.LogRecord) -> None:
        action = getattr(record, "action", None)
        if action is not None:
            self._count(record.levelname, str(action), str(record.msg))
        elif record.levelno >= logging.WARNING:
            # A library's phrase may contain anything, so its name is counted.
            self._count(record.levelname, "library", record.name.partition(".")[0])


def configure_logging(
    log_format: LogFormat,
    level: str,
    *,
    redact: Callable[[str], str] | None = None,
    count: Callable[[str, str, str], None] | None = None,
) -> None:
    """Send the root logger to stderr in `log_format`, from `level` up; `count` also gets lines below it, from INFO
    up.
    """
    redact = redact or Redactor()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(redact, job_facts) if log_format is LogFormat.JSON else TextFormatter(redact))
    handler.setLevel(level)
    root = logging.getLogger()
    root.handlers[:] = [handler] if count is None else [handler, CountingHandler(count)]
    root.setLevel(min(handler.level, logging.INFO))
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(max(logging.WARNING, handler.level))
    logging.captureWarnings(True)
    threading.excepthook = _thread_ended
    sys.excepthook = _process_ends


def _thread_ended(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit or arguments.exc_value is None:
        return
    facts = {"action": "thread", "thread_name": arguments.thread.name if arguments.thread else ""}
    logger.critical(
        "thread ended by an exception",
        extra=facts,
        exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
    )


def _process_ends(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("process ended by an exception", extra={"action": "process"}, exc_info=(kind, error, trace))


def job_facts(record: logging.LogRecord) -> dict[str, object]:
    """Return a record's facts, and the job that the thread works on."""
    return (_job.get() or {}) | facts_of(record)
