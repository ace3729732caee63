"""`visionq-worker`: start a worker, check, fine-tune or evaluate a model, run the benches."""

from __future__ import annotations

import gc
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from pydantic import ValidationError

from api_stub.contract.error import explain
from api_stub.contract.finetune import FinetuneMethod, FinetuneOptions, FinetuneRecipe, Finetuning
from worker.bench.commands import bench
from worker.errors import CannotStart, WorkerError
from worker.lifecycle.health import Health
from worker.lifecycle.probes import OperationsServer
from worker.lifecycle.supervisor import EXIT_CANNOT_START, Supervisor, parse_devices
from worker.observability.logging import Redactor, configure_logging
from worker.observability.metrics import Metrics
from worker.refusal import read_settings, refuse
from worker.settings import LogFormat, WorkerSettings

if TYPE_CHECKING:
    from worker.lifecycle.process import WorkerProcess
    from worker.lifecycle.trainer import TrainerProcess

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.add_typer(bench, name="bench")

#: What only fine-tuning needs.
TRAINING_PACKAGES = ("peft", "jiwer")
MODEL_HELP = "VISIONQ_MODEL: `demo`, `demo-captioner`, a folder, a hub id or s3://bucket/prefix/"


def print_version(is_asked: bool) -> None:
    """Print the installed version and exit with status 0, when it is asked for."""
    if is_asked:
        typer.echo(f"visionq-worker {version('visionq-worker')}")
        raise typer.Exit


@app.callback()
def program(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="print the version and exit")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def start(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    model_name: Annotated[str | None, typer.Option(help="VISIONQ_MODEL_NAME: serves queue visionq.<name>")] = None,
    devices: Annotated[
        str | None, typer.Option(help="one supervised worker per entry: `0,1`, `0+1,2+3` (two GPUs each), `cpu,cpu`")
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="take fine-tuning jobs, one at a time, and serve no model")
    ] = False,
) -> None:
    """Load one model, then consume its queue until SIGTERM. Or, with --training, the queue of fine-tuning."""
    options = {"model": model, "model_name": model_name}
    given = {name: value for name, value in options.items() if value is not None}
    settings = read_settings(given)
    consumed = settings.of_trainer if training else settings
    if training and (missing := [name for name in TRAINING_PACKAGES if find_spec(name) is None]):
        refuse(f"--training needs {', '.join(missing)}: pip install 'visionq-worker[train]'")
    metrics = Metrics(consumed.model_name)
    redact = Redactor(settings.secrets())
    configure_logging(settings.log_format, settings.log_level, redact=redact, count=metrics.count_log_event)
    if devices is not None:
        sys.exit(supervise(devices, given, settings, ["--training"] if training else []))
    health = answer_probes(settings, metrics)
    # torch and transformers are imported only now, so that a bad setting is reported within milliseconds.
    from worker.broker.app import make_app, serve
    from worker.broker.link_sender import LinkSender, make_sender
    from worker.broker.tasks import register
    from worker.lifecycle.exchange import StartAgain
    from worker.lifecycle.job_process import STOP_TIMEOUT_S

    try:
        process = _build(training, settings, metrics, health)
        process.start()
    except CannotStart as error:
        refuse(redact(str(error)))
    except StartAgain:
        _start_again()
    celery_app = make_app(
        consumed,
        process.consumption.received,
        process.metrics.count_dropped,
        process.leave_unanswered,
        lambda: process.may_consume,
    )
    sender = LinkSender(make_sender(settings), process.ledger)
    register(celery_app, process, sender.wake)
    sender.start()
    _freeze_objects()
    status = serve(celery_app, consumed, process)
    sender.stop(STOP_TIMEOUT_S)
    process.stop()
    _freeze_objects()
    if process.starts_again and not status:
        _start_again()
    sys.exit(status)


def _start_again() -> NoReturn:
    """Begin this process anew, with its arguments, environment and process id."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "worker.cli", *sys.argv[1:]])


def _build(
    training: bool, settings: WorkerSettings, metrics: Metrics, health: Health
) -> WorkerProcess | TrainerProcess:
    if training:
        from worker.bootstrap_training import build_trainer

        return build_trainer(settings, metrics, health)
    from worker.bootstrap import build

    return build(settings, metrics, health)


def _freeze_objects() -> None:
    """Exclude all objects that exist now from garbage collection: the libraries, the model and the components.

    They exist until the process ends, and traversing them costs every full collection, also those at the interpreter's
    exit, tens of milliseconds to seconds.
    """
    gc.collect()
    gc.freeze()


@app.command()
def check(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
) -> None:
    """Load the model, answer about one picture, print settings and memory; no Redis, no S3. Fails on any problem."""
    settings = read_settings({} if model is None else {"model": model})
    configure_logging(LogFormat.TEXT, settings.log_level)
    from worker.check import check as check_model

    try:
        typer.echo(check_model(settings))
    except CannotStart as error:
        refuse(str(error))


@app.command()
def finetune(
    data: Annotated[str, typer.Argument(help="data set: a folder or s3://bucket/prefix/ with a metadata.jsonl")],
    base: Annotated[str, typer.Option(help=f"what is fine-tuned, as {MODEL_HELP}")],
    output: Annotated[str, typer.Option(help="where checkpoints go: a folder or s3://bucket/prefix/")],
    method: Annotated[FinetuneMethod, typer.Option(help="all weights, an adapter, or one beside nf4 weights")] = (
        FinetuneMethod.FULL
    ),
    recipe: Annotated[FinetuneRecipe, typer.Option(help="auto: chat for a model with a chat template")] = (
        FinetuneRecipe.AUTO
    ),
    max_steps: Annotated[int | None, typer.Option(min=1, help="optimizer steps")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the training split, instead of steps")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="the highest one; it falls to 0")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="examples of one forward")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(min=1, help="forwards of one step")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="steps between evaluations with a checkpoint")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="rank of the adapter")] = None,
    freeze_vision: Annotated[bool, typer.Option("--freeze-vision", help="the vision tower learns nothing")] = False,
    loader_workers: Annotated[int | None, typer.Option(min=0, help="threads that prepare batches ahead")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of everything that is random")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on, also with other numbers of steps or rates")] = False,
) -> None:
    """Train on a data set; leave checkpoints that can be served. The same command again continues the run."""
    settings = read_settings({})
    configure_logging(LogFormat.TEXT, settings.log_level)
    if find_spec("jiwer") is None:
        refuse("fine-tuning needs the `train` extra: pip install 'visionq-worker[train]'")
    options = {
        "max_steps": max_steps, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation, "eval_every": eval_every, "lora_rank": lora_rank,
        "loader_workers": loader_workers, "seed": seed, "resume": resume or None,
        "freeze_vision": freeze_vision or None,
    }  # fmt: skip
    from worker.training.command import absolute, finetune_here
    from worker.training.progress import Stopped

    try:
        job = Finetuning(
            base=absolute(base),
            dataset=absolute(data),
            output=absolute(output),
            method=method,
            recipe=recipe,
            options=FinetuneOptions(**options),
        )
        result = finetune_here(job, settings, lambda line: typer.echo(line, err=True))
    except ValidationError as error:
        refuse(explain(error))
    except (WorkerError, Stopped) as error:
        typer.echo(f"visionq-worker: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(result.to_json())


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="data set: a folder or s3://bucket/prefix/")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="examples to answer")] = "validation",
    seed: Annotated[int, typer.Option(help="of the 90/10 split, where no row names a split")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of an answer")] = 128,
    max_examples: Annotated[int, typer.Option(min=0, help="the first so many; 0: all")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole record as JSON")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="draw the curves of the training run that left the checkpoint, as PNG")
    ] = None,
) -> None:
    """Answer a data set's examples through the serving engine and score the answers. No Redis.

    Scores: word error rate, ROUGE-L, exact match and, with 4 or more references each, VQA accuracy; per kind of
    question too. Needs the `train` extra.
    """
    for module in ("jiwer", *(["matplotlib"] if plot is not None else [])):
        if find_spec(module) is None:
            refuse(f"evaluating needs {module}: pip install 'visionq-worker[train]'")
    settings = read_settings({} if model is None else {"model": model})
    configure_logging(LogFormat.TEXT, settings.log_level)
    from worker.evaluate import EvaluationOptions, draw_history
    from worker.evaluate import evaluate as measure

    options = EvaluationOptions(split, seed, max_new_tokens, max_examples)
    try:
        if plot is not None:
            draw_history(settings, plot)
        record = measure(settings, data, options, lambda done, total: typer.echo(f"{done} of {total}", err=True))
    except WorkerError as error:
        typer.echo(f"visionq-worker: {Redactor(settings.secrets())(str(error))}", err=True)
        raise typer.Exit(EXIT_CANNOT_START if isinstance(error, CannotStart) else 1) from error
    typer.echo(record.to_json() if as_json else record.lines())


def answer_probes(settings: WorkerSettings, metrics: Metrics) -> Health:
    """Start the HTTP server of probes and metrics if a port is set; return the health that it reports."""
    # A Redis that missed three beats is away.
    health = Health(3 * settings.beat_s + 1.0)
    if settings.http_port:
        try:
            OperationsServer(settings.http_host, settings.http_port, health, metrics).start()
        except CannotStart as error:
            refuse(str(error))
    return health


def supervise(devices: str, given: dict[str, str], settings: WorkerSettings, options: list[str]) -> int:
    """Run one worker process per device; return the exit status."""
    try:
        parsed = parse_devices(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except CannotStart as error:
        refuse(str(error))
    environment = os.environ | {f"VISIONQ_{name.upper()}": value for name, value in given.items()}
    return Supervisor(
        [sys.executable, "-P", "-m", "worker.cli", "start", *options], parsed, environment, settings
    ).run()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
