"""`visionq dataset`: figures of a good data set, all faults of a broken one, and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from api_stub.cli import worker_program
from api_stub.cli.main import app
from api_stub.devstack import StackFailed
from tests.training_data import DataFolder, asked

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `visionq dataset` with these arguments in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["dataset", *arguments])


def test_a_good_data_set_is_counted_and_shown(run: Run, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    names = [folder.picture(f"{number}.png", number) for number in range(3)]
    rows = [{"file_name": name, "texts": ["One ü.", "two " * 60]} for name in names]
    folder.write(
        [*rows, {"file_name": [names[0], folder.clip("c.mp4")], "messages": asked("Moves?", "Yes.\nIt does.")}]
    )
    done = run("show", ".", "--out", "sheet.png", "--number", "4")
    assert done.exit_code == 0, done.output
    figures, sheet = done.stdout.splitlines()
    assert figures.startswith("3 rows to train, 1 to validate, 0 to test; 4 files; digest ")
    assert sheet == "sheet.png"
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width == 4 * 290 + 10
        # Every example shows its noise above its text; the paper between is white.
        colours = [picture.crop((10 + 290 * n, 10, 290 * n + 280, 320)).getcolors(1 << 20) for n in range(4)]
    assert all(colour is not None and len(colour) > 500 for colour in colours)


def test_all_faults_are_printed_with_their_lines(run: Run, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.write([{"file_name": folder.picture("a.png")}, {"file_name": "no\x1b[31m.png", "text": "a"}, "{"])
    done = run("check", ".")
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"metadata.jsonl:{number}" for number in (1, 2, 3)]
    assert "\x1b" not in done.stdout
    assert "3 faults" in done.stderr
    done = run("check", "elsewhere", "--json")
    assert done.exit_code == 2
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["file"], finding["line"]) == ("metadata.jsonl", None)


@pytest.mark.check
def test_a_place_that_may_not_be_read_and_a_sheet_that_cannot_be_written_are_named(run: Run, tmp_path: Path) -> None:
    done = run("check", "s3://someone-elses/data/", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "media_forbidden"
    folder = DataFolder(tmp_path)
    folder.write({"file_name": folder.picture(f"{number}.png", number), "text": "a"} for number in range(2))
    done = run("show", ".", "--out", "sheet.xyz")
    assert done.exit_code == 2
    assert "sheet.xyz: unknown file extension" in done.stderr


def test_without_the_worker_its_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_module: str) -> list[str]:
        raise StackFailed("no worker: visionq-worker is not installed; pip install visionq-worker")

    monkeypatch.setattr(worker_program, "worker_command", absent)
    done = run("check", ".")
    assert done.exit_code == 2
    assert "pip install visionq-worker" in done.stderr
