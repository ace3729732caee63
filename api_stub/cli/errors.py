"""How a command ends badly: one line on stderr or one JSON object on stdout, and an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Final

import typer

from api_stub.contract.error import ErrorDetail
from api_stub.errors import JobFailed, QueueFull, StorageRefused, StoreUnavailable, StreamRestarted, VisionqError

#: Control characters of a model's text become visible signs: a terminal must not obey them.
_VISIBLE: Final = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(0x7F, 0xA0), 0xFFFD
)


class ExitStatus(IntEnum):
    """What a command's exit status says."""

    OK = 0
    JOB_FAILED = 1
    INVALID = 2
    UNAVAILABLE = 3
    TIMED_OUT = 4
    INTERRUPTED = 130


_STATUS: Final = {
    StoreUnavailable.code: ExitStatus.UNAVAILABLE,
    StorageRefused.code: ExitStatus.UNAVAILABLE,
    QueueFull.code: ExitStatus.UNAVAILABLE,
    StreamRestarted.code: ExitStatus.JOB_FAILED,
}


@contextmanager
def reported(as_json: bool, job_id: str | None = None) -> Iterator[None]:
    """Turn errors into a line on stderr, or a JSON object on stdout, and an exit status."""
    try:
        yield
    except JobFailed as error:
        _report(as_json, job_id, ErrorLine(error.code, error.message, error.retryable), error.details)
        raise typer.Exit(ExitStatus.JOB_FAILED) from error
    except TimeoutError as error:
        _report(as_json, job_id, ErrorLine("timeout", f"{error}; job {job_id} goes on", True))
        raise typer.Exit(ExitStatus.TIMED_OUT) from error
    except VisionqError as error:
        is_busy = isinstance(error, (StoreUnavailable, QueueFull))
        _report(as_json, job_id, ErrorLine(error.code, str(error), is_busy))
        raise typer.Exit(_STATUS.get(error.code, ExitStatus.INVALID)) from error
    except BrokenPipeError:
        raise  # whoever read stdout has left; typer ends the program quietly
    except OSError as error:
        _report(as_json, job_id, ErrorLine("invalid_request", f"{error.filename}: {error.strerror}", False))
        raise typer.Exit(ExitStatus.INVALID) from error


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """An error as it is printed; the same three members that a failed job has."""

    code: str
    message: str
    retryable: bool


def _report(as_json: bool, job_id: str | None, error: ErrorLine, details: Sequence[ErrorDetail] = ()) -> None:
    if as_json:
        named = {} if job_id is None else {"job_id": job_id}
        found = {"details": [one.model_dump(exclude_none=True) for one in details]} if details else {}
        typer.echo(json.dumps(named | {"error": asdict(error) | found}, ensure_ascii=False))
        return
    typer.echo(visible(f"{error.code}: {error.message}"), err=True)
    for one in details:
        typer.echo(visible(f"  {one}"), err=True)


def visible(text: str) -> str:
    """Return the text with its control characters made visible, new lines and tabs apart."""
    return text.translate(_VISIBLE)
