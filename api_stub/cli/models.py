"""`visionq models`: shares checkpoints. visionq-worker's program does the work, as a child process."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from api_stub.cli.flags import JsonFlag
from api_stub.cli.worker_program import run_program

_PROGRAM = "worker.push"

models_app = typer.Typer(no_args_is_help=True)


class _Pushed(BaseModel):
    """What the program printed."""

    model_config = ConfigDict(frozen=True)

    url: str
    commit: str
    files: tuple[str, ...]


@models_app.callback()
def _group() -> None:
    """Share checkpoints. Needs visionq-worker."""


@models_app.command()
def push(
    checkpoint: Annotated[str, typer.Argument(help="A folder or s3://bucket/prefix/: a whole model or an adapter.")],
    to_hub: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the hub; made when missing.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is for everybody to read.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a checkpoint",
    as_json: JsonFlag = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub as one commit: safetensors, JSON and text, never a pickle.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` has stored.
    """
    options = ["--message", message, *(["--public"] if public else [])]
    pushed = run_program(_PROGRAM, [*options, "--", checkpoint, to_hub], _Pushed, as_json=as_json)
    typer.echo(pushed.model_dump_json() if as_json else f"{len(pushed.files)} files: {pushed.url}")
