"""`visionq models`: what serves where, other checkpoints and adapters for running workers, and sharing checkpoints.

Workers are told through Redis, so these commands need a redis:// URL. Pushing is done by visionq-worker's program, as a
child process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from api_stub import connections
from api_stub.cli.errors import ExitStatus, reported, visible
from api_stub.cli.flags import JsonFlag
from api_stub.cli.worker_program import run_program
from api_stub.contract import names
from api_stub.contract.error import explain
from api_stub.contract.promotion import Evaluated, NotBetter, Promotion
from api_stub.contract.serving import Serving
from api_stub.contract.wish import NothingToChange, Wish
from api_stub.errors import InvalidRequest
from api_stub.ledger.ledger import Ledger
from api_stub.settings import ClientSettings
from api_stub.submit import checked_model

_PROGRAM: Final = "worker.push"
_LOOK_S: Final = 0.5

models_app = typer.Typer(no_args_is_help=True)
adapters_app = typer.Typer(no_args_is_help=True, help="Serve LoRA adapters beside a model's base, without a restart.")
models_app.add_typer(adapters_app, name="adapters")

Model = Annotated[str, typer.Argument(help="Name of the model.")]
RecordFile = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="What `visionq-worker evaluate --json` printed of it.")
]
WaitFlag = Annotated[bool, typer.Option("--wait/--no-wait", help="Until every worker serves it.")]
TimeoutFlag = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait; the workers go on.")]


class _Pushed(BaseModel):
    """What the program printed."""

    model_config = ConfigDict(frozen=True)

    url: str
    commit: str
    files: tuple[str, ...]


@models_app.callback()
def _group() -> None:
    """Show what serves where, swap checkpoints and adapters, share checkpoints."""


@models_app.command("list")
def list_models(as_json: JsonFlag = False) -> None:
    """Print what each worker of each model serves, since when, and what operators want."""
    with reported(as_json), _ledger() as ledger:
        for model in sorted(ledger.known() - {names.TRAINING_MODEL_NAME}):
            wish, serving = ledger.wish(model), ledger.serving(model)
            typer.echo(_as_json(model, wish, serving) if as_json else visible("\n".join(_lines(model, wish, serving))))


@models_app.command()
def promote(
    model: Model,
    checkpoint: Annotated[str, typer.Argument(help="A folder of every worker, a hub id or s3://bucket/prefix/.")],
    digest: Annotated[str, typer.Option(help="The weights must have this digest.")] = "",
    record: RecordFile = None,
    if_better: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Only if RECORD is better in it than BASELINE.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The same of what is served now.")
    ] = None,
    wait: WaitFlag = True,
    timeout_s: TimeoutFlag = 600.0,
    as_json: JsonFlag = False,
) -> None:
    """Have all workers of a model serve another checkpoint, one after the other; no job fails for it.

    Each answers the checkpoint's smoke set first. The first one that cannot brings all back to what they served before.
    """
    with reported(as_json):
        promotion = _promotion(checkpoint, digest, if_better, record, baseline)
        with _ledger() as ledger:
            served = {serving.checkpoint for serving in ledger.serving(checked_model(model)).values()}
            try:
                weights = promotion.weights(served)
            except NotBetter as error:
                typer.echo(f"not promoted: {error}", err=True)
                raise typer.Exit(ExitStatus.JOB_FAILED) from error
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
            _change(ledger, model, lambda wish: wish.promoted(weights), timeout_s if wait else 0.0, as_json)


@models_app.command()
def rollback(model: Model, wait: WaitFlag = True, timeout_s: TimeoutFlag = 600.0, as_json: JsonFlag = False) -> None:
    """Have all workers of a model serve the checkpoint before the last promotion again."""
    with reported(as_json), _ledger() as ledger:
        _change(ledger, checked_model(model), Wish.rolled_back, timeout_s if wait else 0.0, as_json)


@adapters_app.command()
def add(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Name: jobs ask for MODEL:NAME.")],
    uri: Annotated[str, typer.Argument(help="A folder of every worker or s3://bucket/prefix/.")],
    wait: WaitFlag = True,
    timeout_s: TimeoutFlag = 600.0,
    as_json: JsonFlag = False,
) -> None:
    """Have all workers of a model serve an adapter, too."""
    with reported(as_json), _ledger() as ledger:
        if not names.is_model_name(adapter) or not uri or "," in uri:
            raise InvalidRequest(f"adapter: a name like a model's and a URI are required, got {adapter[:80]!r}")
        _change(
            ledger,
            checked_model(model),
            lambda wish: wish.with_adapter(adapter, uri),
            timeout_s if wait else 0.0,
            as_json,
        )


@adapters_app.command()
def remove(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Name of the adapter.")],
    wait: WaitFlag = True,
    timeout_s: TimeoutFlag = 600.0,
    as_json: JsonFlag = False,
) -> None:
    """Have no worker of a model serve an adapter any more, one of VISIONQ_ADAPTERS included."""
    with reported(as_json), _ledger() as ledger:
        left_s = timeout_s if wait else 0.0
        _change(ledger, checked_model(model), lambda wish: wish.with_adapter(adapter, ""), left_s, as_json)


@models_app.command()
def push(
    checkpoint: Annotated[str, typer.Argument(help="A folder or s3://bucket/prefix/: a whole model or an adapter.")],
    to_hub: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the hub; made when missing.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is for everybody to read.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a checkpoint",
    as_json: JsonFlag = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub as one commit: safetensors, JSON and text, never a pickle.

    Needs visionq-worker. The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` has stored.
    """
    options = ["--message", message, *(["--public"] if public else [])]
    pushed = run_program(_PROGRAM, [*options, "--", checkpoint, to_hub], _Pushed, as_json=as_json)
    typer.echo(pushed.model_dump_json() if as_json else f"{len(pushed.files)} files: {pushed.url}")


@contextmanager
def _ledger() -> Iterator[Ledger]:
    with connections.store_errors():
        settings = ClientSettings.load()
        with connections.commands(settings.redis_url.get_secret_value()) as client:
            yield Ledger(client, settings.ledger)


def _promotion(
    checkpoint: str, digest: str, if_better: str | None, record: Path | None, baseline: Path | None
) -> Promotion:
    try:
        return Promotion(
            checkpoint=checkpoint,
            digest=digest,
            if_better=if_better,
            record=None if record is None else Evaluated.model_validate_json(record.read_bytes()),
            baseline=None if baseline is None else Evaluated.model_validate_json(baseline.read_bytes()),
        )
    except ValidationError as error:
        raise InvalidRequest(explain(error)) from error


def _change(ledger: Ledger, model: str, change: Callable[[Wish], Wish], timeout_s: float, as_json: bool) -> None:
    """Want something else, wait for the workers, tell what came of it."""
    try:
        wish = ledger.change_wish(model, change)
    except NothingToChange as error:
        raise InvalidRequest(str(error)) from error
    give_up_at, had_workers = time.monotonic() + timeout_s, bool(ledger.serving(model))
    while True:
        now, serving = ledger.wish(model), ledger.serving(model)
        are_done = all(each.number == wish.number for each in serving.values()) and not ledger.is_changing(model)
        is_over = now.number != wish.number or (are_done and (now.is_fulfilled or not had_workers))
        if is_over or time.monotonic() >= give_up_at:
            break
        time.sleep(_LOOK_S)
    typer.echo(_as_json(model, now, serving) if as_json else visible("\n".join(_lines(model, now, serving))))
    if now.number != wish.number:
        typer.echo(visible(f"{model}: given up: {now.problem or 'somebody wanted something else'}"), err=True)
        raise typer.Exit(ExitStatus.JOB_FAILED)
    if not is_over and timeout_s:
        typer.echo(f"{model}: not all workers after {timeout_s:g} s; they go on", err=True)
        raise typer.Exit(ExitStatus.TIMED_OUT)


def _as_json(model: str, wish: Wish, serving: Mapping[str, Serving]) -> str:
    wanted = wish.model_dump(mode="json", exclude_none=True, exclude={"before"})
    workers = [{"worker": worker} | each.model_dump(mode="json") for worker, each in serving.items()]
    return json.dumps({"model": model, "wanted": wanted, "workers": workers}, ensure_ascii=False)


def _lines(model: str, wish: Wish, serving: Mapping[str, Serving]) -> Iterator[str]:
    source = wish.weights.source or "what VISIONQ_MODEL says"
    yield f"{model}: wanted since {_time(wish.at)}: {source}" if wish.number else model
    if wish.problem:
        yield f"  given up before: {wish.problem}"
    for worker, each in serving.items():
        adapters = "".join(f" +{name}" for name in each.adapters)
        scores = "".join(f" {name}={value:.4g}" for name, value in each.scores.items())
        yield f"  {worker}  {each.source}{adapters}  {each.checkpoint[:12]}  since {_time(each.since)}{scores}"
    if not serving:
        yield "  no worker tells what it serves"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
