"""Draws what teaches the chat model a ninth colour: `python -m worker.demo_model.learning.ninth_colour --out DIR`.

Half of the conversations for training are about pictures with something teal in them; the other half are about the
colours that the model knows, one picture, several, or the frames of a clip, so that it forgets nothing. The exam asks
the new colour, captions with it, and every kind of question that the model was taught before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import cv2

from worker.demo_model.learning.conversations import (
    EVEN,
    HARD,
    Conversation,
    clip_conversation,
    image_conversation,
    images_conversation,
    messages,
)
from worker.demo_model.learning.exam import KINDS, exam
from worker.demo_model.scenes import COLOURS, Pixels, Rgb, draw, draw_varied

COLOUR: Final = "teal"
RGB: Final[Rgb] = (10, 120, 120)
METADATA: Final = "metadata.jsonl"
NEW_KINDS: Final = ("colour", "caption")
NUM_VALIDATION: Final = 100

#: One row: the kind of question, the pictures, and the conversation, which the assistant ends.
Row = tuple[str, Sequence[Pixels], Sequence[dict[str, object]]]


@contextmanager
def nine_colours() -> Iterator[None]:
    """Let scenes that are drawn in the block have the ninth colour, too."""
    COLOURS[COLOUR] = RGB
    try:
        yield
    finally:
        del COLOURS[COLOUR]


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes rows and their pictures into a folder."""

    folder: Path

    def write(self, rows: Iterator[tuple[str, Row]]) -> None:
        """Write `(split, row)` pairs. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        with (self.folder / METADATA).open("w", encoding="utf-8") as file:
            for split, (kind, pictures, chat) in rows:
                names = [f"picture-{number + place:05d}.png" for place in range(len(pictures))]
                number += len(names)
                for name, pixels in zip(names, pictures, strict=True):
                    if not cv2.imwrite(str(self.folder / name), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)):
                        raise OSError(f"cannot write {self.folder / name}")
                row = {"file_name": names, "messages": chat, "kind": kind, "split": split}
                file.write(json.dumps(row) + "\n")


def draw_training(folder: Path, count: int, seed: int) -> None:
    """Write conversations for training and some more for validation. Raises OSError."""
    rng = Random(f"{seed} ninth colour")

    def rows() -> Iterator[tuple[str, Row]]:
        for number in range(count + NUM_VALIDATION):
            yield "train" if number < count else "validation", _lesson(rng)

    _Writer(folder).write(rows())


def draw_exam(folder: Path, num_new: int, num_old: int, seed: int) -> None:
    """Write questions about the ninth colour, as kinds `teal colour` and `teal caption`, and of every old kind.

    Without a question of an old kind, `num_old` being 0, the new ones alone. Raises OSError.
    """

    def rows() -> Iterator[tuple[str, Row]]:
        for kind in NEW_KINDS:
            rng = Random(f"{seed} {kind} {COLOUR}")
            yield from (("validation", _new_question(rng, kind)) for _ in range(num_new))
        for kind in KINDS if num_old else ():
            for item in exam(kind, num_old, seed):
                answer: dict[str, object] = {"role": "assistant", "content": [{"type": "text", "text": item.answer}]}
                yield "validation", (kind, item.pictures, [*item.messages, answer])

    _Writer(folder).write(rows())


def _lesson(rng: Random) -> Row:
    if rng.random() < 0.5:
        with nine_colours():
            talk = _about_the_ninth(rng, lambda: image_conversation(rng, 3))
    else:
        mix = rng.choice((EVEN, HARD))
        talk = rng.choices(
            (
                lambda: image_conversation(rng, 3, mix),
                lambda: images_conversation(rng, 2, mix),
                lambda: clip_conversation(rng, 2, mix),
            ),
            (40, 30, 30),
        )[0]()
    pictures = [draw_varied(scene, rng) for turn in talk for scene in turn.scenes]
    return "lesson", pictures, messages(talk)


def _new_question(rng: Random, kind: str) -> Row:
    """Return a question whose answer has the ninth colour in it."""
    with nine_colours():
        while True:
            talk = image_conversation(rng, 1, kinds=[kind])
            if COLOUR in talk[-1].question.answer:
                break
    return f"{COLOUR} {kind}", [draw(scene) for turn in talk for scene in turn.scenes], messages(talk)


def _about_the_ninth(rng: Random, make: Callable[[], Conversation]) -> Conversation:
    """Return a conversation about a picture with the ninth colour in it."""
    while True:
        talk = make()
        if any(thing.colour == COLOUR for turn in talk for scene in turn.scenes for thing in scene.things):
            return talk


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the data set for training, and the exam beside it."""
    parser = argparse.ArgumentParser(prog="python -m worker.demo_model.learning.ninth_colour", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder; gets the folders `training` and `exam`")
    parser.add_argument("--count", type=int, default=3000, help="conversations for training")
    parser.add_argument("--new", type=int, default=200, help="questions of each kind about the ninth colour")
    parser.add_argument("--old", type=int, default=200, help="questions of each kind that was taught before")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    draw_training(args.out / "training", args.count, args.seed)
    draw_exam(args.out / "exam", args.new, args.old, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
