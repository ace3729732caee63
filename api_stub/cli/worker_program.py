"""Programs of visionq-worker that commands here run as child processes, and the one JSON object that each prints."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import TypeVar

import typer
from pydantic import BaseModel, ValidationError

from api_stub.cli.errors import ExitStatus, reported, visible
from api_stub.contract.error import ErrorInfo
from api_stub.devstack import StackFailed
from api_stub.devstack.servers import worker_command

Answer = TypeVar("Answer", bound=BaseModel)


class _Failed(BaseModel):
    error: ErrorInfo


def run_program(program: str, arguments: Sequence[str], answer: type[Answer], *, as_json: bool) -> Answer:
    """Run a module of the worker and read what it prints; leave with its error when it tells one.

    Its lines about the progress go to stderr as they come.
    """
    with reported(as_json):
        done = subprocess.run([*worker_command(program), *arguments], stdout=subprocess.PIPE, text=True, check=False)
        try:
            if done.returncode == 0:
                return answer.model_validate_json(done.stdout)
            error = _Failed.model_validate_json(done.stdout).error
        except ValidationError as unreadable:
            raise StackFailed(f"the worker's program ended with exit status {done.returncode}") from unreadable
    if as_json:
        typer.echo(done.stdout.strip())
    else:
        typer.echo(visible(f"{error.code}: {error.message}"), err=True)
    raise typer.Exit(ExitStatus.UNAVAILABLE if error.retryable else ExitStatus.INVALID)
