"""The command-line flags that every job command shares, declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Final, get_type_hints

import typer

from api_stub.submit import JobOptions

JSON_HELP: Final = "Print one JSON object: the result or the error."
TIMEOUT_HELP: Final = "Seconds of silence after which to stop watching; the job goes on."

JsonFlag = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
TimeoutFlag = Annotated[float | None, typer.Option(min=0, help=TIMEOUT_HELP)]
UrlFlag = Annotated[
    str | None,
    typer.Option(help="redis:// or a gateway's http://; else VISIONQ_REDIS_URL or VISIONQ_API_URL."),
]


@dataclass(frozen=True, slots=True)
class JobFlags:
    """What a job command takes besides its media and its text. None: not given."""

    model: Annotated[str | None, typer.Option(help="Model name that routes the job.")] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest tokens to generate.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens.")] = None
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest token.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 avoids repetition.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None
    min_pixels: Annotated[
        int | None, typer.Option(help="Pixels that a picture or frame is enlarged to, where the model's processor can.")
    ] = None
    max_pixels: Annotated[
        int | None, typer.Option(help="Most pixels of a picture or frame that the model is shown.")
    ] = None
    deadline: Annotated[float | None, typer.Option(help="Seconds from now after which the job ends.")] = None
    priority: Annotated[int | None, typer.Option(help="0 (first) to 9.")] = None
    tenant: Annotated[str | None, typer.Option(help="Who is asking.")] = None
    job_id: Annotated[
        str | None, typer.Option(help="Id of the job, a UUID; the same id and job again is the same job.")
    ] = None
    url: UrlFlag = None
    timeout: TimeoutFlag = None
    as_json: JsonFlag = False

    @property
    def options(self) -> JobOptions:
        """The part that belongs to the job."""
        return JobOptions(
            model=self.model,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            media_options=self._media_options,
            deadline_s=self.deadline,
            priority=self.priority,
            tenant=self.tenant,
        )

    @property
    def _media_options(self) -> dict[str, object] | None:
        given = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return {name: value for name, value in given.items() if value is not None} or None


def takes_job_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of JobFlags, handed over as its argument `flags`."""
    shared = [field.name for field in fields(JobFlags)]

    @wraps(command)
    def run(**arguments: object) -> None:
        given = {name: arguments.pop(name) for name in shared}
        command(**arguments, flags=JobFlags(**given))  # type: ignore[arg-type]

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
    added = list(inspect.signature(JobFlags).parameters.values())
    hints = get_type_hints(command, include_extras=True) | get_type_hints(JobFlags, include_extras=True)
    parameters = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in (*own, *added)]
    # typer reads a command's flags from its signature and its annotations.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: hints[p.name] for p in parameters}
    del run.__wrapped__
    return run
