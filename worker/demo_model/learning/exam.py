"""Held-out questions for a checkpoint: drawn at 200 × 200 without training's variations, one kind at a time.

Each kind has its own generator, seeded by the exam's seed and the kind's name, so a kind's items do not depend on
which other kinds are asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import cv2
import numpy as np

from worker.demo_model.clips import Action, make_clip
from worker.demo_model.draw import CLIP_FRAMES as CLIP_FILE_FRAMES
from worker.demo_model.draw import write_clip
from worker.demo_model.learning.conversations import (
    Conversation,
    clip_conversation,
    image_conversation,
    images_conversation,
    messages,
)
from worker.demo_model.questions import CLIP_QUESTIONS, IMAGE_QUESTIONS, IMAGES_QUESTIONS
from worker.demo_model.scenes import Pixels, draw

THIRD_TURN = "third_turn"
KINDS = (*IMAGE_QUESTIONS, *IMAGES_QUESTIONS, *CLIP_QUESTIONS, THIRD_TURN)
CLIP_FRAMES = 4
CLIP_FILE_ACTIONS = {"motion": Action.MOVE, "colour_at_end": Action.TURN}


@dataclass(frozen=True, slots=True)
class Item:
    """One question through the chat: RGB pictures in order, the messages that show them, and the true answer."""

    kind: str
    pictures: tuple[Pixels, ...]
    messages: list[dict[str, object]]
    answer: str


def exam(kind: str, num: int, seed: int) -> list[Item]:
    """`num` items of one kind of `KINDS`."""
    rng = Random(f"{seed} {kind}")
    return [_item(kind, _conversation(rng, kind)) for _ in range(num)]


def clip_file_exam(kind: str, num: int, seed: int, num_frames: int, container: str) -> Iterator[Item]:
    """Questions about clips that went through a compressed file and come back as uniformly sampled frames.

    `kind` is one of `CLIP_FILE_ACTIONS`; a shape that moves is asked about its motion, one that turns about its colour.
    """
    rng = Random(f"{seed} {kind} in files")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"clip.{container}"
        for _ in range(num):
            clip = make_clip(rng, CLIP_FILE_FRAMES, CLIP_FILE_ACTIONS[kind])
            write_clip(path, clip)
            question = CLIP_QUESTIONS[kind](rng, clip)
            if question:
                frames = sample_frames(path, num_frames)
                content = [*({"type": "image"} for _ in frames), {"type": "text", "text": question.text}]
                yield Item(kind, tuple(frames), [{"role": "user", "content": content}], question.answer)


def sample_frames(path: Path, num_frames: int) -> list[Pixels]:
    """`num_frames` frames from the first to the last, evenly spaced, RGB. Raises OSError when there is none."""
    video = cv2.VideoCapture(str(path))
    frames: list[Pixels] = []
    try:
        while (read := video.read())[0]:
            frames.append(np.asarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB), np.uint8))
    finally:
        video.release()
    if not frames:
        raise OSError(f"no frames in {path}")
    return [frames[round(i)] for i in np.linspace(0, len(frames) - 1, num_frames)]


def _conversation(rng: Random, kind: str) -> Conversation:
    if kind in IMAGE_QUESTIONS:
        return image_conversation(rng, 1, kinds=[kind])
    if kind in IMAGES_QUESTIONS:
        return images_conversation(rng, 1, kinds=[kind])
    if kind in CLIP_QUESTIONS:
        return clip_conversation(rng, 1, kinds=[kind], num_frames=CLIP_FRAMES)
    if kind == THIRD_TURN:
        return _three_turns(rng)
    raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")


def _three_turns(rng: Random) -> Conversation:
    """Three questions of any kind about one image; the third is the item, the first two come with true answers."""
    while True:
        conversation = image_conversation(rng, 3)
        if len(conversation) == 3 and not any(turn.scenes for turn in conversation[1:]):
            return conversation


def _item(kind: str, conversation: Conversation) -> Item:
    chat = messages(conversation)
    pictures = tuple(draw(scene) for turn in conversation for scene in turn.scenes)
    return Item(kind, pictures, chat[:-1], conversation[-1].question.answer)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
