"""The drawing program: real files, read back with OpenCV, and the truth it prints about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest

from worker.demo_model.clips import Action, make_clip
from worker.demo_model.draw import CLIP_FRAMES, draw_files, main, write_clip, write_picture
from worker.demo_model.scenes import make_scene


def frames_of(path: Path) -> list[np.ndarray]:
    video = cv2.VideoCapture(str(path))
    frames = []
    while True:
        ok, frame = video.read()
        if not ok:
            video.release()
            return frames
        frames.append(frame)


def test_by_default_one_picture_and_one_clip_are_drawn_with_their_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "new")]) == 0
    picture, clip = json.loads(capsys.readouterr().out)["drawings"]
    assert picture["kind"] == "image"
    assert cv2.imread(picture["path"]).shape == (200, 200, 3)
    assert [(q["task"], q["kind"]) for q in picture["questions"]] == [
        ("caption", "caption"), ("vqa", "colour"), ("vqa", "count"),
    ]  # fmt: skip
    assert clip["kind"] == "video"
    assert [q["kind"] for q in clip["questions"]] == ["motion", "colour_at_end"]
    assert len(frames_of(Path(clip["path"]))) == CLIP_FRAMES


@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_a_clip_file_shows_the_motion_that_was_drawn(tmp_path: Path, container: str) -> None:
    clip = make_clip(Random(4), CLIP_FRAMES, Action.MOVE)
    path = tmp_path / f"clip.{container}"
    write_clip(path, clip)
    frames = frames_of(path)
    assert len(frames) == CLIP_FRAMES
    for frame, scene in ((frames[0], clip.frames[0]), (frames[-1], clip.frames[-1])):
        thing = scene.things[0]
        shown = frame[round(thing.y * 200 / 64), round(thing.x * 200 / 64), ::-1].astype(int)
        assert np.abs(shown - thing.rgb).max() < 40


def test_pictures_of_one_call_are_all_different_and_the_same_next_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(60)]
    first = list(draw_files(paths, Random(7)))
    again = list(draw_files(paths, Random(7)))
    assert first == again
    assert len(first) == 60
    assert len({drawing.questions[0].answer for drawing in first}) == 60
    assert len({Path(drawing.path).read_bytes() for drawing in first}) == 60


def test_a_count_draws_pictures_only_unless_clips_are_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--out", str(tmp_path), "--count", "3"])
    assert [d["kind"] for d in json.loads(capsys.readouterr().out)["drawings"]] == ["image"] * 3
    main(["--out", str(tmp_path), "--count", "1", "--clips", "2", "--container", "avi"])
    drawn = json.loads(capsys.readouterr().out)["drawings"]
    assert [Path(d["path"]).suffix for d in drawn] == [".png", ".avi", ".avi"]


def test_named_files_are_the_default_drawings_under_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--out", str(tmp_path)])
    numbered = json.loads(capsys.readouterr().out)["drawings"]
    assert main([str(tmp_path / "scene.png"), str(tmp_path / "clip.mp4")]) == 0
    named = json.loads(capsys.readouterr().out)["drawings"]
    assert [d["path"] for d in named] == [str(tmp_path / "scene.png"), str(tmp_path / "clip.mp4")]
    assert [d["questions"] for d in named] == [d["questions"] for d in numbered]
    assert Path(named[0]["path"]).read_bytes() == Path(numbered[0]["path"]).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "name files, or"), (["a.png", "--out", "."], "name files, or"), (["a.png", "b.jpg"], "b.jpg: the name must")],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "missing" / "scene.png"
    with pytest.raises(OSError, match="cannot write"):
        write_picture(path, make_scene(Random(0)))
    assert main([str(path)]) == 1
    assert capsys.readouterr().err == f"cannot write {path}\n"


def test_drawing_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, worker.demo_model.draw, worker.demo_model.learning.conversations; "
        "print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
