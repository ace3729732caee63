"""The shipped checkpoint: small, anonymous, loadable, and right about drawn scenes through the real path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from worker.demo_model import CHECKPOINT
from worker.demo_model.draw import main as draw
from worker.demo_model.learning.answering import Answerer
from worker.demo_model.learning.evaluate import main as evaluate
from worker.demo_model.learning.exam import KINDS, Item, clip_file_exam, exam, sample_frames

PERFECT = ("caption", "colour", "shape", "count", "exists", "describe_nth", "motion", "colour_at_end")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer.load(CHECKPOINT)


def test_the_checkpoint_is_small_and_names_no_place() -> None:
    files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    assert sum(map(len, files.values())) < 8 * 2**20
    for name, content in files.items():
        text = content if name != "model.safetensors" else content[: 8 + int.from_bytes(content[:8], "little")]
        assert not re.search(rb"/(home|root|tmp|usr|work)\b|_name_or_path|https?://", text), name


def test_the_weights_are_stored_in_half_precision_and_run_in_single(answerer: Answerer) -> None:
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "float16"
    assert answerer.model.dtype == torch.float32
    assert 2.6e6 < answerer.num_parameters < 2.8e6


@pytest.mark.parametrize("kind", PERFECT)
def test_the_kinds_it_knows_are_answered_right(answerer: Answerer, kind: str) -> None:
    items = exam(kind, 12, seed=4)
    assert answerer.answer(items) == [item.answer for item in items]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(PERFECT)))
def test_the_other_kinds_are_answered_mostly_right(answerer: Answerer, kind: str) -> None:
    items = exam(kind, 8, seed=4)
    assert sum(given == item.answer for given, item in zip(answerer.answer(items), items, strict=True)) >= 6


def test_answers_follow_the_picture_and_the_order_of_frames(answerer: Answerer) -> None:
    items = exam("motion", 12, seed=9)
    moving = [item for item in items if item.answer in ("left", "right", "up", "down")]
    backwards = [Item(i.kind, i.pictures[::-1], i.messages, i.answer) for i in moving]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert answerer.answer(backwards) == [opposite[item.answer] for item in moving]


@pytest.mark.parametrize(("container", "num_frames"), [("mp4", 8), ("avi", 4)])
def test_motion_survives_compression_and_sampling(answerer: Answerer, container: str, num_frames: int) -> None:
    items = list(clip_file_exam("motion", 8, 5, num_frames, container))
    assert answerer.answer(items) == [item.answer for item in items]


def test_the_default_drawings_are_answered_right(
    answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(["--out", str(tmp_path)])
    for drawing in json.loads(capsys.readouterr().out)["drawings"]:
        path = Path(drawing["path"])
        frames = tuple(sample_frames(path, 8 if drawing["kind"] == "video" else 1))
        for asked in drawing["questions"]:
            content = [*({"type": "image"} for _ in frames), {"type": "text", "text": asked["text"]}]
            item = Item(asked["kind"], frames, [{"role": "user", "content": content}], asked["answer"])
            assert answerer.answer([item]) == [asked["answer"]]


def test_sampled_frames_run_from_the_first_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(["--out", str(tmp_path), "--clips", "1", "--container", "avi"])
    capsys.readouterr()
    every = sample_frames(tmp_path / "clip-0000.avi", 24)
    some = sample_frames(tmp_path / "clip-0000.avi", 3)
    assert np.array_equal(some[0], every[0])
    assert np.array_equal(some[-1], every[-1])
    (tmp_path / "empty.avi").touch()
    with pytest.raises(OSError, match=r"empty\.avi"):
        sample_frames(tmp_path / "empty.avi", 3)


def test_evaluation_prints_a_table_and_writes_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert evaluate(["--n", "4", "--kinds", "caption", "clip_caption", "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["caption", "clip_caption"]
    scores = json.loads(report.read_text())["scores"]
    assert scores[0]["num_right"] == scores[0]["num_items"] == 4
    for score in scores:
        assert len(score["mistakes"]) == min(3, score["num_items"] - score["num_right"])
