"""Draws pictures and clips to files and prints what is true about them: `python -m worker.demo_model.draw scene.png`.

Files are named, or a directory for numbered ones (`--out`). Prints one JSON object, `{"seed": …, "drawings": [{"path",
"kind": "image" | "video", "questions": [{"task", "kind", "text", "answer"}, …]}, …]}`. The same seed draws the same
scenes; the captions of one call's pictures all differ. Imports neither torch nor transformers, so a producer may run it
as a child process: that is `visionq draw`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import cv2

from worker.demo_model.clips import Action, Clip, make_clip
from worker.demo_model.questions import CLIP_QUESTIONS, IMAGE_QUESTIONS, caption
from worker.demo_model.scenes import Scene, draw, make_scene

CAPTION_PROMPT = "Describe this image."
PICTURE_KINDS = ("colour", "count")
CLIP_KINDS = ("motion", "colour_at_end")
PICTURE_SIZE = 200
PICTURE_SUFFIX = ".png"
CLIP_FRAMES, CLIP_FPS = 24, 12.0
CODECS = {"mp4": "mp4v", "avi": "MJPG"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that may be put to the queue: `task` is caption, vqa or video_qa."""

    task: str
    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A file and what is true about it."""

    path: str
    kind: str
    questions: tuple[Asked, ...]


def draw_files(paths: Iterable[Path], rng: Random) -> Iterator[Drawing]:
    """Write each file, over what is there: a picture (.png), or a clip of two seconds in which one shape moves.

    No two pictures have the same caption. Raises OSError when a file cannot be written.
    """
    scenes = _different_scenes(rng)
    for path in paths:
        if path.suffix == PICTURE_SUFFIX:
            scene = next(scenes)
            write_picture(path, scene)
            yield Drawing(str(path), "image", _picture_questions(rng, scene))
        else:
            clip = make_clip(rng, CLIP_FRAMES, Action.MOVE, wobble=0.2)
            write_clip(path, clip)
            yield Drawing(str(path), "video", _clip_questions(rng, clip))


def _different_scenes(rng: Random) -> Iterator[Scene]:
    captions: set[str] = set()
    while True:
        scene = make_scene(rng, distinct_shapes=True)
        if caption(scene) not in captions:
            captions.add(caption(scene))
            yield scene


def write_picture(path: Path, scene: Scene) -> None:
    """Write a scene as an image file. Raises OSError when it cannot."""
    if not cv2.imwrite(str(path), cv2.cvtColor(draw(scene, PICTURE_SIZE), cv2.COLOR_RGB2BGR)):
        raise OSError(f"cannot write {path}")


def write_clip(path: Path, clip: Clip, fps: float = CLIP_FPS) -> None:
    """Write a clip; the suffix chooses the codec. Raises OSError when OpenCV has no encoder or cannot write."""
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.removeprefix(".")])
    writer = cv2.VideoWriter(str(path), codec, fps, (PICTURE_SIZE, PICTURE_SIZE))
    if not writer.isOpened():
        raise OSError(f"cannot write {path}")
    try:
        for frame in clip.frames:
            writer.write(cv2.cvtColor(draw(frame, PICTURE_SIZE), cv2.COLOR_RGB2BGR))
    finally:
        writer.release()


def _picture_questions(rng: Random, scene: Scene) -> tuple[Asked, ...]:
    asked = [IMAGE_QUESTIONS[kind](rng, scene, "") for kind in PICTURE_KINDS]
    return (
        Asked("caption", "caption", CAPTION_PROMPT, caption(scene)),
        *(Asked("vqa", q.kind, _as_typed(q.text), q.answer) for q in asked if q),
    )


def _clip_questions(rng: Random, clip: Clip) -> tuple[Asked, ...]:
    asked = [CLIP_QUESTIONS[kind](rng, clip) for kind in CLIP_KINDS]
    return tuple(Asked("video_qa", q.kind, _as_typed(q.text), q.answer) for q in asked if q)


def _as_typed(text: str) -> str:
    return text[:1].upper() + text[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, then print the JSON."""
    args = _parse(argv)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    try:
        drawings = list(draw_files(args.files or _numbered(args), Random(args.seed)))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    json.dump({"seed": args.seed, "drawings": [asdict(drawing) for drawing in drawings]}, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


def _numbered(args: argparse.Namespace) -> list[Path]:
    num_pictures = 1 if args.count is None else args.count
    num_clips = args.clips if args.clips is not None else int(args.count is None)
    pictures = [args.out / f"picture-{i:04d}{PICTURE_SUFFIX}" for i in range(num_pictures)]
    return [*pictures, *(args.out / f"clip-{i:04d}.{args.container}" for i in range(num_clips))]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.demo_model.draw", description=main.__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="files to draw: .png pictures; .mp4 or .avi clips")
    parser.add_argument("--out", type=Path, help="directory for numbered files, made when missing; instead of names")
    parser.add_argument("--seed", type=int, default=285, help="the same seed draws the same files")
    parser.add_argument("--count", type=int, help="number of pictures (default: one picture and one clip)")
    parser.add_argument("--clips", type=int, help="number of clips (default: none when --count is given)")
    parser.add_argument("--container", choices=sorted(CODECS), default="mp4", help="file format of the clips")
    args = parser.parse_args(argv)
    if bool(args.files) == (args.out is not None):
        parser.error("name files, or a directory by --out")
    known = {PICTURE_SUFFIX, *(f".{container}" for container in CODECS)}
    if odd := [str(path) for path in args.files if path.suffix not in known]:
        parser.error(f"{odd[0]}: the name must end in one of {', '.join(sorted(known))}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
