"""Conversations: several questions about the same pictures, as a chat would ask them.

A `Turn` carries the scenes that are shown with it; later turns are about what was shown before. The weights say how
often each kind is asked: `EVEN` is a broad mix, `HARD` leans towards the kinds that are learned last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from worker.demo_model.clips import make_clip
from worker.demo_model.questions import CLIP_QUESTIONS, IMAGE_QUESTIONS, IMAGES_QUESTIONS, Question
from worker.demo_model.scenes import Scene, make_scene

GREETINGS = ("hello", "hi", "hello!", "who are you?")
GREETING_ANSWER = "hello, please show me an image"
MAX_TRIES = 60

Topic = TypeVar("Topic")


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user shows and asks, and the true answer."""

    scenes: tuple[Scene, ...]
    question: Question


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each kind of question is asked, in the order of the tables in `questions.py`."""

    image: tuple[int, ...]
    images: tuple[int, ...]
    clip: tuple[int, ...]


EVEN = Mix(
    image=(30, 18, 14, 10, 6, 10, 9, 7, 4),
    images=(30, 25, 15, 15, 5, 10),
    clip=(38, 28, 10, 8, 8, 8),
)
HARD = Mix(
    image=(14, 26, 12, 8, 8, 18, 16, 4, 2),
    images=(36, 26, 14, 16, 2, 6),
    clip=(26, 30, 12, 14, 6, 12),
)


def image_conversation(
    rng: Random, max_turns: int = 4, mix: Mix = EVEN, kinds: Sequence[str] | None = None
) -> Conversation:
    """Questions about one image; now and then a new image is shown half-way. `kinds` limits what is asked."""
    scene = make_scene(rng)
    turns: list[Turn] = []
    asked: set[str] = set()
    is_shown = False
    for _ in range(MAX_TRIES):
        if len(turns) == max_turns:
            break
        question = IMAGE_QUESTIONS[_pick(rng, IMAGE_QUESTIONS, mix.image, kinds)](rng, scene, "")
        if question is None or question.text in asked:
            scene, is_shown = (make_scene(rng), False) if kinds else (scene, is_shown)
            continue
        asked.add(question.text)
        turns.append(Turn(() if is_shown else (scene,), question))
        is_shown = True
        if not kinds and len(turns) < max_turns and rng.random() < 0.06:
            scene, is_shown, asked = make_scene(rng), False, set()
    return tuple(turns)


def images_conversation(
    rng: Random, max_turns: int = 3, mix: Mix = EVEN, kinds: Sequence[str] | None = None
) -> Conversation:
    """Questions about two or three images of one or two things each, all shown with the first question."""
    num = rng.choices((2, 3), (65, 35))[0]

    def show() -> tuple[Scene, ...]:
        return tuple(make_scene(rng, rng.choice((1, 1, 2))) for _ in range(num))

    def ask(scenes: tuple[Scene, ...]) -> Question | None:
        kind = _pick(rng, IMAGES_QUESTIONS, mix.images, kinds)
        return IMAGES_QUESTIONS[kind](rng, scenes, rng.randrange(num))

    return _talk(show, ask, lambda scenes: scenes, max_turns, is_fixed=kinds is None)


def clip_conversation(
    rng: Random,
    max_turns: int = 3,
    mix: Mix = EVEN,
    kinds: Sequence[str] | None = None,
    num_frames: int | None = None,
) -> Conversation:
    """Questions about a clip, whose frames are shown as images with the first question."""
    return _talk(
        lambda: make_clip(rng, num_frames),
        lambda clip: CLIP_QUESTIONS[_pick(rng, CLIP_QUESTIONS, mix.clip, kinds)](rng, clip),
        lambda clip: clip.frames,
        max_turns,
        is_fixed=kinds is None,
    )


def greeting(rng: Random) -> Conversation:
    """A turn without pictures."""
    return (Turn((), Question("greeting", rng.choice(GREETINGS), GREETING_ANSWER)),)


def messages(conversation: Conversation, *, is_text_first: bool = False) -> list[dict[str, object]]:
    """The conversation, answers included, as chat messages for a processor's `apply_chat_template`."""
    result: list[dict[str, object]] = []
    for turn in conversation:
        images = [{"type": "image"} for _ in turn.scenes]
        text = [{"type": "text", "text": turn.question.text}]
        result.append({"role": "user", "content": text + images if is_text_first else images + text})
        result.append({"role": "assistant", "content": [{"type": "text", "text": turn.question.answer}]})
    return result


def _talk(
    show: Callable[[], Topic],
    ask: Callable[[Topic], Question | None],
    scenes_of: Callable[[Topic], tuple[Scene, ...]],
    max_turns: int,
    *,
    is_fixed: bool,
) -> Conversation:
    """Ask different questions about one topic; unless it is fixed, another is shown when a question does not fit."""
    topic = show()
    turns: list[Turn] = []
    asked: set[str] = set()
    for _ in range(MAX_TRIES):
        if len(turns) == max_turns:
            break
        question = ask(topic)
        if question is None or question.text in asked:
            topic = topic if is_fixed or turns else show()
            continue
        asked.add(question.text)
        turns.append(Turn(() if turns else scenes_of(topic), question))
    return tuple(turns)


def _pick(rng: Random, table: Mapping[str, object], weights: Sequence[int], kinds: Sequence[str] | None) -> str:
    return rng.choice(kinds) if kinds else rng.choices(list(table), weights)[0]
