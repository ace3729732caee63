"""Both programs say which release is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

import api_stub.cli.main
import worker.cli

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(("app", "name"), [(api_stub.cli.main.app, "visionq"), (worker.cli.app, "visionq-worker")])
def test_version_prints_the_program_and_its_version(app: Typer, name: str) -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.stdout) == (0, f"{name} {PROJECT['version']}\n")
