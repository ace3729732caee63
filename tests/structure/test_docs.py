"""The pages are true: their code runs, their commands exist, their tables agree with the code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from api_stub.cli.main import app as visionq
from api_stub.contract.error import ErrorCode
from tests.processes import ctrl_c_is_heard
from tests.servers import eventually
from tests.structure import settings_table
from tests.structure.pages import DOCS, FENCE, PAGES, ROOT, Block, anchors_of, blocks_of, every_page, links_of, prose_of
from worker.cli import app as visionq_worker

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.why_not_run is None]
BIN = Path(sys.executable).parent
Stack = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`visionq up`, as the pages say, in a directory with the files that the pages draw; one for all blocks."""
    directory = tmp_path_factory.mktemp("docs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VISIONQ_", "AWS_"))}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    drawing = ["visionq", "draw", "scene.png", "clip.mp4"]
    subprocess.run(drawing, cwd=directory, env=environment, check=True, capture_output=True, timeout=120)
    with ctrl_c_is_heard():
        up = subprocess.Popen(
            ["visionq", "up", "--env-file", "stack.env"], cwd=directory, env=environment, start_new_session=True
        )
    try:
        eventually(lambda: (directory / "stack.env").exists() or up.poll() is not None, 120, "the stack is up")
        assert up.poll() is None
        yield directory, environment
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) is not None


def run(command: list[str], stack: Stack) -> str:
    directory, environment = stack
    script = 'set -eu; . ./stack.env; exec "$@"'
    finished = subprocess.run(
        ["bash", "-c", script, "docs", *command],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def those_in(language: str) -> list[Block]:
    return [block for block in RUN if block.language == language]


def test_there_is_code_to_run() -> None:
    assert len(those_in("python")) >= 4
    assert len(those_in("bash")) >= 1
    assert len(those_in("js")) >= 1


@pytest.mark.parametrize("block", those_in("python"), ids=str)
def test_python_blocks_run_as_they_stand(block: Block, stack: Stack) -> None:
    assert run([sys.executable, "-c", block.code], stack).strip()


@pytest.mark.parametrize("block", those_in("bash"), ids=str)
def test_shell_blocks_run_line_by_line(block: Block, stack: Stack) -> None:
    for line in filter(None, map(str.strip, block.code.splitlines())):
        assert run(["bash", "-euc", line], stack).strip()


@pytest.mark.skipif(shutil.which("node") is None and "CI" not in os.environ, reason="no Node.js on this machine")
@pytest.mark.parametrize("block", those_in("js"), ids=str)
def test_node_blocks_run_as_they_stand(block: Block, stack: Stack) -> None:
    assert run(["node", "--input-type=module", "-e", block.code], stack).strip()


def test_blocks_that_are_not_run_say_where_they_are_and_the_place_exists() -> None:
    for block in BLOCKS:
        for place in re.findall(r"(?:tests/|\.ci/)[\w/.]+", block.why_not_run or ""):
            assert (ROOT / place.rstrip(".")).exists(), f"{block}: {place}"


def test_every_block_names_its_language_and_every_one_that_is_not_run_is_excused() -> None:
    for page in PAGES:
        fences = [line for line in page.read_text("utf-8").splitlines() if line.lstrip().startswith(FENCE)]
        assert len(fences) == 2 * len(blocks_of(page)), page
    for block in BLOCKS:
        assert block.language in {"bash", "python", "js", "text"}, block


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in every_page():
        for target in set(re.findall(r"(?:^|`)make (\w+)", page.read_text("utf-8"), re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: {target}"


@pytest.mark.parametrize(("program", "app"), [("visionq", visionq), ("visionq-worker", visionq_worker)])
def test_commands_that_are_named_exist(program: str, app: object) -> None:
    known = set(getattr(get_command(app), "commands"))  # type: ignore[arg-type]  # noqa: B009
    named = {
        (page, command)
        for page in every_page()
        for command in re.findall(rf"(?:^|`|/){program} ([a-z][a-z-]*)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert len(named) >= 3
    assert [(page, command) for page, command in named if command not in known] == []


def test_files_and_headings_that_links_name_exist() -> None:
    for page in every_page():
        for link in links_of(page):
            place, _, anchor = link.partition("#")
            target = page.parent / place if place else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors_of(target), f"{page}: {link}"


def test_every_page_of_docs_is_linked_from_the_index() -> None:
    linked = {(DOCS / link).resolve() for link in links_of(DOCS / "README.md")}
    assert {page for page in DOCS.glob("*.md") if page.name != "README.md"} <= linked


def test_the_settings_tables_are_the_settings() -> None:
    text = settings_table.PAGE.read_text("utf-8")
    assert settings_table.with_tables(text) == text, "run: python -m tests.structure.settings_table"
    for variable in settings_table.variables():
        assert text.count(f"| `{variable}` |") == 1, variable


def test_settings_that_the_pages_name_exist() -> None:
    known = set(settings_table.variables())
    elsewhere = "".join((ROOT / name).read_text("utf-8") for name in (".env.example", "Makefile"))
    for page in PAGES:
        for variable in set(re.findall(r"\bVISIONQ_[A-Z0-9_]*[A-Z0-9]\b", page.read_text("utf-8"))):
            assert variable in known or variable in elsewhere, f"{page}: {variable}"


def test_every_error_code_is_explained() -> None:
    text = prose_of(DOCS / "errors.md")
    assert [code for code in ErrorCode if f"`{code.value}`" not in text] == []
