"""The README is true: its code runs, its commands exist, its tables agree with the code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from api_stub.contract.error import ErrorCode
from tests.e2e.scenes import draw
from tests.processes import ctrl_c_is_heard
from tests.servers import eventually
from tests.structure.settings_table import README, with_table

ROOT = README.parent
BLOCK = re.compile(r"(?:<!-- not run here: (?P<why>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Block:
    """One fenced block of the README."""

    language: str
    code: str
    why_not_run: str | None


BLOCKS = [Block(match["language"], match["code"], match["why"]) for match in BLOCK.finditer(README.read_text())]
RUN = [block for block in BLOCKS if block.why_not_run is None]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """`visionq up`, as the README says, in a directory that has the files its commands name."""
    directory = tmp_path_factory.mktemp("readme")
    for drawing in draw(directory, "--count", "1", "--clips", "1"):
        path = Path(str(drawing["path"]))
        path.rename(directory / {".png": "scene.png", ".mp4": "clip.mp4"}[path.suffix])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VISIONQ_", "AWS_"))}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
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


def run(command: list[str], stack: tuple[Path, dict[str, str]]) -> str:
    directory, environment = stack
    script = 'set -eu; . ./stack.env; exec "$@"'
    finished = subprocess.run(
        ["bash", "-c", script, "readme", *command],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_there_is_code_to_run() -> None:
    assert sum(block.language == "python" for block in RUN) >= 4
    assert sum(block.language == "bash" for block in RUN) >= 1
    assert sum(block.language == "js" for block in RUN) >= 1


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "python"], ids=lambda b: b.code[:40])
def test_python_blocks_run_as_they_stand(block: Block, stack: tuple[Path, dict[str, str]]) -> None:
    assert run([sys.executable, "-c", block.code], stack).strip()


@pytest.mark.parametrize("block", [block for block in RUN if block.language == "bash"], ids=lambda b: b.code[:40])
def test_shell_blocks_run_line_by_line(block: Block, stack: tuple[Path, dict[str, str]]) -> None:
    for line in filter(None, map(str.strip, block.code.splitlines())):
        assert run(["bash", "-euc", line], stack).strip()


@pytest.mark.skipif(shutil.which("node") is None and "CI" not in os.environ, reason="no Node.js on this machine")
@pytest.mark.parametrize("block", [block for block in RUN if block.language == "js"], ids=lambda b: b.code[:40])
def test_node_blocks_run_as_they_stand(block: Block, stack: tuple[Path, dict[str, str]]) -> None:
    assert run(["node", "--input-type=module", "-e", block.code], stack).strip()


def test_blocks_that_are_not_run_say_where_they_are_and_the_place_exists() -> None:
    for block in BLOCKS:
        for place in re.findall(r"(?:tests/|\.ci/)[\w/.]+", block.why_not_run or ""):
            assert (ROOT / place.rstrip(".")).exists(), place


def test_every_language_that_is_not_run_is_excused() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "js", "text"}


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_are_named_exist() -> None:
    for place in set(re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text())):
        assert (ROOT / place).exists(), place


def test_the_settings_table_is_the_settings() -> None:
    text = README.read_text()
    assert with_table(text) == text, "run: python -m tests.structure.settings_table"


def test_every_error_code_is_explained() -> None:
    text = README.read_text()
    assert [code for code in ErrorCode if f"`{code.value}`" not in text] == []
