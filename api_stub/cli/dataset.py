"""`visionq dataset`: checks a data set before it is trained on, and draws a contact sheet of it.

visionq-worker's program does both, as a child process: this side has neither a picture library nor the worker's code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from api_stub.cli.errors import ExitStatus, visible
from api_stub.cli.flags import JsonFlag
from api_stub.cli.worker_program import run_program

_PROGRAM = "worker.training.inspect_data"

dataset_app = typer.Typer(
    no_args_is_help=True, help="Check and look at data sets for fine-tuning. Needs visionq-worker."
)

DataUri = Annotated[
    str, typer.Argument(metavar="URI", help="A folder or s3://bucket/prefix/ with metadata.jsonl in it.")
]
SeedFlag = Annotated[int, typer.Option(help="Of the split into training and validation, where no row names one.")]


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True)

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file if self.line is None else f'{self.file}:{self.line}'}: {self.message}"


class _Inspected(BaseModel):
    """What the program printed: findings, or the figures of a data set without any."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[_Finding, ...]
    digest: str = ""
    num_files: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    sheet: Path | None = None


@dataset_app.command()
def check(uri: DataUri, seed: SeedFlag = 0, as_json: JsonFlag = False) -> None:
    """Read every row and decode every file; print all faults, each with its line. Exit status 2 if there is one."""
    _show(_inspect(["--seed", str(seed), "--", uri], as_json), as_json)


@dataset_app.command()
def show(
    uri: DataUri,
    out: Annotated[Path, typer.Option(help="Picture file to write, over what is there: .png or .jpg.")],
    number: Annotated[int, typer.Option(min=1, max=400, help="Examples on the sheet.")] = 24,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
) -> None:
    """Draw a contact sheet: a sample of the examples with their texts, lines and splits."""
    options = ["--out", str(out), "--number", str(number), "--seed", str(seed)]
    _show(_inspect([*options, "--", uri], as_json), as_json)


def _inspect(arguments: list[str], as_json: bool) -> _Inspected:
    return run_program(_PROGRAM, arguments, _Inspected, as_json=as_json)


def _show(found: _Inspected, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), ensure_ascii=False))
    elif found.findings:
        for finding in found.findings:
            typer.echo(visible(str(finding)))
        typer.echo(f"{len(found.findings)} {'fault' if len(found.findings) == 1 else 'faults'}", err=True)
    else:
        rows = f"{found.train} rows to train, {found.validation} to validate, {found.test} to test"
        typer.echo(f"{rows}; {found.num_files} files; digest {found.digest}")
        if found.sheet is not None:
            typer.echo(str(found.sheet))
    if found.findings:
        raise typer.Exit(ExitStatus.INVALID)
