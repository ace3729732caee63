"""`visionq dead`: the jobs that were given up because the workers that held them kept dying."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Final

import typer

from api_stub.client import Client
from api_stub.contract.view import JobView
from api_stub.flags import JsonFlag
from api_stub.report import reported, visible
from api_stub.terminal import describe

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
