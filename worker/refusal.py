"""Why a command of `visionq-worker` does not start: one line on standard error, and an exit status."""

from __future__ import annotations

from typing import NoReturn

import typer
from pydantic import ValidationError

from api_stub.ledger.settings import explain_settings
from worker.lifecycle.supervisor import EXIT_CANNOT_START
from worker.settings import WorkerSettings


def read_settings(given: dict[str, str]) -> WorkerSettings:
    """Read the settings; exit with a message that names the variable when one is invalid."""
    try:
        return WorkerSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        refuse(explain_settings(WorkerSettings, error))


def refuse(message: str) -> NoReturn:
    """Print why the worker does not start, and exit."""
    typer.echo(f"visionq-worker: cannot start: {message}", err=True)
    raise typer.Exit(EXIT_CANNOT_START)
