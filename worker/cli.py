"""`visionq-worker`: start a worker, check a model, run the benches."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from worker.errors import CannotStart
from worker.observability.logging import configure_logging
from worker.settings import WorkerSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

EXIT_CANNOT_START = 78  # EX_CONFIG: restarting without a change would fail again


@app.callback()
def _commands() -> None:
    """Keep `start` a subcommand whatever else there is."""


@app.command()
def start(
    model: Annotated[str | None, typer.Option(help="VISIONQ_MODEL: `demo`, a directory or a hub id")] = None,
    model_name: Annotated[str | None, typer.Option(help="VISIONQ_MODEL_NAME: serves queue visionq.<name>")] = None,
) -> None:
    """Load one model, then consume its queue until SIGTERM."""
    given = {"model": model, "model_name": model_name}
    settings = read_settings({name: value for name, value in given.items() if value is not None})
    configure_logging(settings.log_format, settings.log_level)
    # torch and transformers load only now: a wrong setting is told in milliseconds.
    from worker.bootstrap import build
    from worker.celery_app import make_app, ring, serve
    from worker.tasks import register

    try:
        runtime = build(settings)
    except CannotStart as error:
        refuse(str(error))
    celery_app = make_app(settings)
    register(celery_app, runtime)
    runtime.ring = lambda bell: ring(celery_app, bell)
    runtime.start()
    status = serve(celery_app, settings, runtime)
    runtime.stop()
    sys.exit(status)


def read_settings(given: dict[str, str]) -> WorkerSettings:
    """Read the settings; leave with a message that names the variable when one is bad."""
    try:
        return WorkerSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"VISIONQ_{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors(include_url=False)
        )
        refuse(problems)


def refuse(message: str) -> NoReturn:
    """Say why the worker does not start, and leave."""
    typer.echo(f"visionq-worker: cannot start: {message}", err=True)
    raise typer.Exit(EXIT_CANNOT_START)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
