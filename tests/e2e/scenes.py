"""Drawn scenes with their truths, in S3."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Question:
    """Something to ask about a stored drawing."""

    uri: str
    path: Path
    task: str
    text: str
    answer: str


def draw(directory: Path, *options: str) -> list[dict[str, object]]:
    """Run the drawing program; return what it says about its files."""
    command = [sys.executable, "-m", "worker.demo_model.draw", "--out", str(directory), *options]
    finished = subprocess.run(command, check=True, capture_output=True, timeout=120)
    drawings: list[dict[str, object]] = json.loads(finished.stdout)["drawings"]
    return drawings


def stored_questions(s3: S3Client, directory: Path, *options: str) -> list[Question]:
    """Draw, upload to the bucket `media`, and return every question about every file."""
    questions = []
    for drawing in draw(directory, *options):
        path = Path(str(drawing["path"]))
        s3.upload_file(str(path), "media", f"{directory.name}/{path.name}")
        uri = f"s3://media/{directory.name}/{path.name}"
        asked_about: list[dict[str, str]] = drawing["questions"]  # type: ignore[assignment]
        questions.extend(Question(uri, path, asked["task"], asked["text"], asked["answer"]) for asked in asked_about)
    return questions
