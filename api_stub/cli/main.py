"""`visionq`: submit jobs, follow them, ask about them, fine-tune, draw and upload files, export schemas, serve HTTP.

Exit status: 0 done, 1 the job failed, 2 wrong usage or job, 3 Redis or S3 away or the queue full, 4 --timeout passed,
130 Ctrl-C. Ctrl-C and --timeout only stop watching: the job goes on, and its id is printed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from api_stub.cli.dataset import dataset_app
from api_stub.cli.errors import reported
from api_stub.cli.flags import JobFlags, JsonFlag, TimeoutFlag, UrlFlag, takes_job_flags
from api_stub.cli.models import models_app
from api_stub.cli.operators import cancel_many, dead_app, doctor, queue_app
from api_stub.cli.screen import describe, follow
from api_stub.cli.training import finetune
from api_stub.client.client import Client
from api_stub.client.handle import JobHandle
from api_stub.contract.job import DEFAULT_NUM_FRAMES
from api_stub.contract.schema import asyncapi, schemas
from api_stub.demo import run_demo
from api_stub.demo.drawings import SUFFIXES, draw_files
from api_stub.devstack import StackOptions, exit_status, run_up
from api_stub.errors import InvalidRequest, InvalidSettings
from api_stub.gateway.keys import digest_of, is_key_name, new_key
from api_stub.ledger.rows import Cancelled
from api_stub.settings import GatewaySettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Captions and answers about images and clips in S3, from a queue of vision-language workers.",
)

Media = Annotated[list[str] | None, typer.Argument(help="s3:// URIs, or local files, which are uploaded first.")]
Question = Annotated[str, typer.Option("--question", "-q", help="What to ask.")]
JobId = Annotated[str, typer.Argument(help="Id of the job.")]
app.add_typer(dead_app, name="dead")
app.add_typer(queue_app, name="queue")
app.add_typer(dataset_app, name="dataset")
app.add_typer(models_app, name="models")
app.command()(finetune)
app.command()(doctor)


def main() -> None:
    """Entry point of the `visionq` program."""
    app()


def _print_version(is_asked: bool) -> None:
    """Print the installed version and exit with status 0, when it is asked for."""
    if is_asked:
        typer.echo(f"visionq {version('visionq')}")
        raise typer.Exit


@app.callback()
def program(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
@takes_job_flags
def caption(
    media: Media = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Instead of the checkpoint's own.")] = None,
    *,
    flags: JobFlags,
) -> None:
    """Describe one or more images."""

    def submit(client: Client, uris: Sequence[str]) -> JobHandle:
        return client.caption(*uris, prompt=prompt, job_id=flags.job_id, **flags.options)

    _submit_and_show(submit, media or (), flags)


@app.command()
@takes_job_flags
def vqa(question: Question, media: Media = None, *, flags: JobFlags) -> None:
    """Ask a question about images, or about none."""

    def submit(client: Client, uris: Sequence[str]) -> JobHandle:
        return client.vqa(*uris, question=question, job_id=flags.job_id, **flags.options)

    _submit_and_show(submit, media or (), flags)


@app.command()
@takes_job_flags
def video_qa(
    question: Question,
    media: Media = None,
    num_frames: Annotated[int, typer.Option("--num-frames", "--frames", help="Frames per clip.")] = DEFAULT_NUM_FRAMES,
    *,
    flags: JobFlags,
) -> None:
    """Ask a question about one or more clips."""

    def submit(client: Client, uris: Sequence[str]) -> JobHandle:
        return client.video_qa(*uris, question=question, num_frames=num_frames, job_id=flags.job_id, **flags.options)

    _submit_and_show(submit, media or (), flags)


@app.command()
def watch(job_id: JobId, url: UrlFlag = None, timeout: TimeoutFlag = None, as_json: JsonFlag = False) -> None:
    """Follow a job from its beginning, also one that has ended."""
    with reported(as_json, job_id), Client(url) as client:
        follow(client.job(job_id), as_json, timeout)


@app.command()
def status(job_id: JobId, url: UrlFlag = None, as_json: JsonFlag = False) -> None:
    """Tell where a job is."""
    with reported(as_json, job_id), Client(url) as client:
        view = client.job(job_id).status()
    print(view.to_json() if as_json else describe(view))


@app.command()
def cancel(
    job_id: Annotated[str | None, typer.Argument(help="Id of the job; or say which ones by options.")] = None,
    status: Annotated[str | None, typer.Option(help="All that are `queued` or `in_progress`.")] = None,
    model: Annotated[str | None, typer.Option(help="All of a model.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="All with this in their metadata: JSON, else text; may be repeated."),
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose, with these options.")] = "",
    url: UrlFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """End a queued job; tell a running one to stop. Or all of a tenant's jobs that the options name."""
    is_many = status is not None or model is not None or bool(metadata)
    if (job_id is None) != is_many:
        raise typer.BadParameter("name one job, or say which by --status, --model or --metadata")
    with reported(as_json, job_id), Client(url) as client:
        if job_id is None:
            cancel_many(client, status=status, model=model, metadata=metadata or (), tenant=tenant, as_json=as_json)
            return
        answer = client.job(job_id).cancel()
    words = "had ended before" if answer is Cancelled.FINAL else answer.value
    print(json.dumps({"job_id": job_id, "cancel": answer.value}) if as_json else words)


@app.command()
def delete(job_id: JobId, url: UrlFlag = None, as_json: JsonFlag = False) -> None:
    """Remove a finished job, its events and its result. What was uploaded stays."""
    with reported(as_json, job_id), Client(url) as client:
        client.job(job_id).delete()
    print(json.dumps({"job_id": job_id, "deleted": True}) if as_json else "deleted")


@app.command()
def upload(
    files: Annotated[list[Path], typer.Argument(help="Local files.")],
    url: UrlFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Store files in the media bucket and print their s3:// URIs, one per line."""
    with reported(as_json), Client(url) as client:
        for file in files:
            uri = client.upload(file)
            print(json.dumps({"file": str(file), "uri": uri}) if as_json else uri, flush=True)


@app.command()
def draw(
    files: Annotated[list[Path], typer.Argument(help="Files to draw: .png for a picture, .mp4 for a clip.")],
    seed: Annotated[int | None, typer.Option(help="Another number, other drawings.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw pictures and clips to try things with, and print what is true about them. Needs visionq-worker."""
    with reported(as_json):
        for file in files:
            if file.suffix not in SUFFIXES:
                raise InvalidRequest(f"{file}: the name must end in one of {', '.join(SUFFIXES)}")
        for drawing in draw_files(files, seed):
            if as_json:
                print(drawing.model_dump_json())
                continue
            print(drawing.path)
            for question in drawing.questions:
                print(f"  {question.text} → {question.answer}")


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="Directory for one file per schema; else one object.")] = None,
    as_asyncapi: Annotated[
        bool, typer.Option("--asyncapi", help="One AsyncAPI 3 document of all that goes through Redis instead.")
    ] = False,
) -> None:
    """Export the JSON Schemas of job, event, result, view and error."""
    if as_asyncapi:
        document = json.dumps(asyncapi(), indent=2)
        if out is None:
            print(document)
            return
        out.mkdir(parents=True, exist_ok=True)
        (file := out / "asyncapi.json").write_text(document + "\n", encoding="utf-8")
        print(file)
        return
    if out is None:
        print(json.dumps(schemas(), indent=2))
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, body in schemas().items():
        file = out / f"{name}.schema.json"
        file.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        print(file)


@app.command()
def up(
    env_file: Annotated[
        Path | None, typer.Option(help="Gets the endpoints as `export` lines once all is ready.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Workers to start.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="VISIONQ_MODEL: `demo`, `demo-captioner`, a directory or a hub id.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Jobs that a worker generates at once.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Also a worker that fine-tunes.")] = False,
) -> None:
    """Run Redis, S3 and workers on this machine until Ctrl-C. Needs no Docker."""
    options = StackOptions(num_workers=workers, model=model, concurrency=concurrency, training=training)
    raise typer.Exit(exit_status(lambda: run_up(options, env_file, lambda line: typer.echo(line, err=True))))


@app.command()
def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on; else VISIONQ_API_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port; else VISIONQ_API_PORT.")] = None,
    key_name: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="Make a key for NAME, print it, and serve nothing.")
    ] = None,
) -> None:
    """Serve the HTTP gateway until SIGTERM or Ctrl-C. Needs the `api` extra."""
    with reported(as_json=False):
        if key_name is not None:
            _print_new_key(key_name)
            return
        if importlib.util.find_spec("uvicorn") is None:
            raise InvalidSettings("the gateway is not installed: pip install 'visionq[api]'")
        given = {"api_host": host, "api_port": port}
        settings = GatewaySettings.load().model_copy(update={k: v for k, v in given.items() if v is not None})
        # By name: the other commands work without the web framework.
        importlib.import_module("api_stub.gateway.app").serve(settings)


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per job.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="Keep everything running afterwards, until Ctrl-C.")] = False,
) -> None:
    """Start everything, ask about drawn scenes, show the answers next to the truth. Fails when one is not true."""
    raise typer.Exit(exit_status(lambda: run_demo(as_json, stay)))


def _print_new_key(name: str) -> None:
    if not is_key_name(name):
        raise InvalidRequest(f"--new-key: 1 to 64 letters, digits and . _ - are allowed, got {name[:80]!r}")
    key = new_key()
    print(f"key:   {key}\nentry: {name}:{digest_of(key)}")
    print("Give the key to its owner, it is not shown again; put the entry into VISIONQ_API_KEYS.", file=sys.stderr)


def _submit_and_show(
    submit: Callable[[Client, Sequence[str]], JobHandle], media: Sequence[str], flags: JobFlags
) -> None:
    with reported(flags.as_json, flags.job_id), Client(flags.url) as client:
        job = submit(client, _uploaded(client, media))
        with reported(flags.as_json, job.id):
            follow(job, flags.as_json, flags.timeout)


def _uploaded(client: Client, media: Sequence[str]) -> list[str]:
    """Upload what is no URI. Every file is looked for before the first one is sent."""
    for path in media:
        if "://" not in path:
            Path(path).stat()
    return [uri if "://" in uri else client.upload(uri) for uri in media]
