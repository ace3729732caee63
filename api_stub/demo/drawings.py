"""Pictures and clips for trying the service, drawn by visionq-worker's program, with what is true about them.

That program runs as a child process, because this side has neither OpenCV nor the worker's code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from api_stub.devstack import StackFailed
from api_stub.devstack.servers import worker_command

DRAW_S = 60.0
#: What can be drawn: a picture and a clip.
SUFFIXES = (".png", ".mp4")
_PROGRAM = "worker.demo_model.draw"


class Question(BaseModel):
    """Something to ask about a drawing: `task` is caption, vqa or video_qa."""

    model_config = ConfigDict(frozen=True)

    task: str
    text: str
    answer: str


class Drawing(BaseModel):
    """A file that was drawn, and what is true about it."""

    model_config = ConfigDict(frozen=True)

    path: Path
    kind: Literal["image", "video"]
    questions: tuple[Question, ...]


class _Drawings(BaseModel):
    drawings: tuple[Drawing, ...]


def draw_files(files: Sequence[Path], seed: int | None = None) -> tuple[Drawing, ...]:
    """Draw each file, over what is there; the suffix, one of SUFFIXES, says what. Raises StackFailed.

    The same seed draws the same scenes; None takes the program's own.
    """
    seeded = [] if seed is None else ["--seed", str(seed)]
    command = [*worker_command(_PROGRAM), *seeded, "--", *map(str, files)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAW_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StackFailed(f"the drawing program did not end within {DRAW_S:.0f} s") from error
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise StackFailed(f"the drawing program ended with exit status {done.returncode}: {last_line}")
    return drawings_of(done.stdout)


def command_for(directory: Path, seed: int) -> list[str]:
    """Return the command that draws a picture and a clip into a directory. Raises StackFailed."""
    return [*worker_command(_PROGRAM), "--out", str(directory), "--seed", str(seed)]


def drawings_of(output: str) -> tuple[Drawing, ...]:
    """Read what the drawing program printed. Raises StackFailed."""
    try:
        return _Drawings.model_validate_json(output).drawings
    except ValidationError as error:
        raise StackFailed(f"the drawing program printed something else than drawings: {error}") from error
