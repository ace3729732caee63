"""`visionq draw`: files of the names that are given, what is true about them, and errors that name what is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from api_stub.cli.main import app
from api_stub.demo import drawings

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `visionq draw` with these arguments in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["draw", *arguments])


def test_files_are_drawn_and_what_is_true_about_them_is_told(run: Run, tmp_path: Path) -> None:
    done = run("scene.png", "clip.mp4")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "scene.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["scene.png", "clip.mp4"]
    assert all(" → " in line for line in lines if line.startswith(" "))
    assert len(lines) >= 7


def test_json_has_one_object_per_file_and_a_seed_draws_the_same_again(run: Run, tmp_path: Path) -> None:
    done = run("a.png", "b.png", "--seed", "5", "--json")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["path"], each["kind"]) for each in told] == [("a.png", "image"), ("b.png", "image")]
    assert told[0]["questions"][0]["answer"] != told[1]["questions"][0]["answer"]
    before = (tmp_path / "a.png").read_bytes()
    again = run("a.png", "--seed", "5", "--json")
    assert json.loads(again.stdout) == told[0]
    assert (tmp_path / "a.png").read_bytes() == before
    other = run("a.png", "--seed", "6", "--json")
    assert json.loads(other.stdout) != told[0]


def test_a_name_that_begins_with_a_dash_is_a_file(run: Run, tmp_path: Path) -> None:
    assert run("--", "-a.png").exit_code == 0
    assert (tmp_path / "-a.png").exists()


def test_another_suffix_is_refused_before_anything_is_drawn(run: Run, tmp_path: Path) -> None:
    done = run("a.png", "b.gif")
    assert done.exit_code == 2
    assert "b.gif: the name must end in one of .png, .mp4" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(run: Run) -> None:
    done = run("missing/a.png", "--json")
    assert done.exit_code == 2
    assert "cannot write missing/a.png" in json.loads(done.stdout)["error"]["message"]


def test_a_drawing_program_that_hangs_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(drawings.subprocess, "run", hang)
    done = run("a.png")
    assert done.exit_code == 2
    assert "did not end within 60 s" in done.stderr
