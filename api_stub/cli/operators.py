"""What operators type: `visionq dead`, `visionq queue`, the cancelling of many jobs, and `visionq doctor`.

Dead jobs are those that were given up because the workers that held them kept dying. The doctor's exit status is 0 when
nothing is a problem, 1 when something is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Annotated, Final

import typer

from api_stub import connections
from api_stub.cli.errors import reported, visible
from api_stub.cli.flags import JsonFlag, UrlFlag
from api_stub.cli.screen import describe
from api_stub.client.client import Client
from api_stub.contract.view import JobView
from api_stub.doctor import Level, examine
from api_stub.errors import InvalidRequest
from api_stub.ledger.rows import QueueChange
from api_stub.settings import ClientSettings

#: As many as the ledger keeps.
ALL: Final = 10_000

dead_app = typer.Typer(no_args_is_help=True, help="Jobs that were given up because their workers kept dying.")

JobIds = Annotated[list[str] | None, typer.Argument(help="Ids of dead jobs.")]
AllFlag = Annotated[bool, typer.Option("--all", help="All dead jobs.")]


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=ALL, help="Most jobs to print.")] = 100, as_json: JsonFlag = False
) -> None:
    """Print the dead jobs, newest first, one per line."""
    with reported(as_json), Client() as client:
        for view in client.dead(limit):
            typer.echo(view.to_json() if as_json else _line(view))


@dead_app.command()
def show(job_id: Annotated[str, typer.Argument(help="Id of the job.")], as_json: JsonFlag = False) -> None:
    """Tell everything about one dead job."""
    with reported(as_json, job_id), Client() as client:
        view = client.job(job_id).status()
    typer.echo(view.to_json() if as_json else describe(view))


@dead_app.command()
def retry(job_ids: JobIds = None, every: AllFlag = False, as_json: JsonFlag = False) -> None:
    """Queue new jobs with the bodies of dead ones and print their ids. Asked twice, the same new jobs."""

    def act(client: Client, job_id: str) -> dict[str, object]:
        return {"job_id": job_id, "retried_as": client.retry(job_id).id}

    _for_each(job_ids, every, as_json, act, lambda done: str(done["retried_as"]))


@dead_app.command()
def drop(job_ids: JobIds = None, every: AllFlag = False, as_json: JsonFlag = False) -> None:
    """Take jobs off the list. Their results stay as long as results are kept."""

    def act(client: Client, job_id: str) -> dict[str, object]:
        return {"job_id": job_id, "dropped": client.drop(job_id)}

    _for_each(
        job_ids,
        every,
        as_json,
        act,
        lambda done: f"{done['job_id']} {'dropped' if done['dropped'] else 'was not on it'}",
    )


def _for_each(
    job_ids: Iterable[str] | None,
    every: bool,
    as_json: bool,
    act: Callable[[Client, str], dict[str, object]],
    words: Callable[[dict[str, object]], str],
) -> None:
    if bool(job_ids) == every:
        raise typer.BadParameter("name jobs, or say --all")
    with reported(as_json), Client() as client:
        for job_id in [view.job_id for view in client.dead(ALL)] if every else job_ids or ():
            with reported(as_json, job_id):
                done = act(client, job_id)
            typer.echo(json.dumps(done) if as_json else visible(words(done)))


def _line(view: JobView) -> str:
    message = view.error.message if view.error is not None else ""
    return visible(f"{view.job_id}  {view.model}  {view.task or '-'}  {view.attempt} attempts  {message}")


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
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, value if isinstance(parsed, dict | list) else parsed


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


def doctor(
    max_keys: Annotated[int, typer.Option(min=1, help="Most keys to look at.")] = 200_000, as_json: JsonFlag = False
) -> None:
    """Examine Redis, settings, workers and queues; look for what is left lying about. Changes nothing."""
    is_ill = False
    with reported(as_json), connections.store_errors():
        settings = ClientSettings.load()
        with connections.commands(settings.redis_url.get_secret_value()) as client:
            for finding in examine(client, settings.ledger, max_keys):
                is_ill = is_ill or finding.level is Level.PROBLEM
                line = f"{finding.level.value:8} {finding.check:10} {finding.message}"
                typer.echo(json.dumps(asdict(finding), ensure_ascii=False) if as_json else visible(line))
    raise typer.Exit(1 if is_ill else 0)
