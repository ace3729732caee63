"""`visionq queue`: what operators do with a model's queue; and the cancelling of many jobs at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from api_stub.client import Client
from api_stub.errors import InvalidRequest
from api_stub.flags import JsonFlag, UrlFlag
from api_stub.ledger.rows import QueueChange
from api_stub.report import reported

queue_app = typer.Typer(no_args_is_help=True, help="Pause a model's queue, let it go on, empty it.")

Model = Annotated[str, typer.Argument(help="Name of the model.")]


@queue_app.command()
def pause(model: Model, url: UrlFlag = None, as_json: JsonFlag = False) -> None:
    """Let nobody claim the model's jobs: running ones end, submits are taken, deadlines count."""
    with reported(as_json), Client(url) as client:
        change = client.pause(model)
    _tell(model, change, as_json, "paused", "was paused already")


@queue_app.command()
def resume(model: Model, url: UrlFlag = None, as_json: JsonFlag = False) -> None:
    """Let the model's jobs be claimed again, in their order."""
    with reported(as_json), Client(url) as client:
        change = client.resume(model)
    _tell(model, change, as_json, "goes on", "was not paused")


@queue_app.command()
def purge(
    model: Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: UrlFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Cancel all queued jobs of the model, of all tenants. Running ones go on."""
    with reported(as_json):
        if not yes:
            _confirm(f"Cancel all queued jobs of the model {model!r}, of all tenants?")
        with Client(url) as client:
            num = client.purge(model)
    typer.echo(json.dumps({"model": model, "cancelled": num}) if as_json else f"{model}: {num} queued jobs cancelled")


def cancel_many(
    client: Client, *, status: str | None, model: str | None, metadata: Iterable[str], tenant: str, as_json: bool
) -> None:
    """Cancel the jobs that have all that is given, and say how many. Raises InvalidRequest."""
    done = client.cancel_jobs(status=status, model=model, metadata=dict(map(_member, metadata)), tenant=tenant)
    counts = {"cancelled": done.num_cancelled, "cancelling": done.num_cancelling}
    words = f"{done.num_cancelled} queued jobs cancelled, {done.num_cancelling} running ones told to stop"
    typer.echo(json.dumps(counts) if as_json else words)


def _member(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest(f"--metadata: NAME=VALUE is required, got {text[:80]!r}")
    try:
        said = json.loads(value)
    except ValueError:
        return name, value
    return name, value if isinstance(said, dict | list) else said


def _confirm(question: str) -> None:
    if not _is_terminal():
        raise InvalidRequest("there is nobody to ask: say --yes")
    typer.confirm(question, abort=True, err=True)


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _tell(model: str, change: QueueChange, as_json: bool, done: str, nothing_to_do: str) -> None:
    if as_json:
        typer.echo(json.dumps({"model": model} | asdict(change)))
        return
    words = done if change.is_changed else nothing_to_do
    typer.echo(f"{model}: {words}; {change.depth} jobs queued or running, {change.num_workers} workers")
    if not change.depth and not change.num_workers:
        typer.echo(f"{model}: no jobs and no workers: is this the model's name?", err=True)
