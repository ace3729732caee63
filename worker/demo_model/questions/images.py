"""Questions about several images shown together. `nth` is the one a question may pick out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from worker.demo_model.questions.image import ask_colour, ask_count, caption
from worker.demo_model.questions.question import NUMBERS, ORDINALS, Question
from worker.demo_model.scenes import Scene, with_article


def ask_which_image(rng: Random, scenes: Sequence[Scene], nth: int) -> Question | None:
    """`which image has a star?`, of something one image alone has."""
    candidates: list[tuple[int, str]] = []
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            if sum(any(other.shape == thing.shape for other in s.things) for s in scenes) == 1:
                candidates.append((i, with_article(thing.shape)))
            if sum(any(other.name == thing.name for other in s.things) for s in scenes) == 1:
                candidates.append((i, thing.phrase))
    if not candidates:
        return None
    i, what = rng.choice(candidates)
    return Question("which_image", f"which image {rng.choice(('has', 'shows'))} {what}?", ORDINALS[i])


def ask_describe_nth(rng: Random, scenes: Sequence[Scene], nth: int) -> Question:
    """`describe the second image.`"""
    template = rng.choice(("describe the {} image.", "what is in the {} image?"))
    return Question("describe_nth", template.format(ORDINALS[nth]), caption(scenes[nth]))


def ask_colour_nth(rng: Random, scenes: Sequence[Scene], nth: int) -> Question | None:
    """`what colour is the star in the second image?`"""
    asked = ask_colour(rng, scenes[nth], f" in the {ORDINALS[nth]} image")
    return asked and Question("colour_nth", asked.text, asked.answer)


def ask_count_nth(rng: Random, scenes: Sequence[Scene], nth: int) -> Question:
    """`how many shapes are there in the second image?`"""
    asked = ask_count(rng, scenes[nth], f" in the {ORDINALS[nth]} image")
    return Question("count_nth", asked.text, asked.answer)


def ask_describe_each(rng: Random, scenes: Sequence[Scene], nth: int) -> Question:
    """`describe each image.`"""
    parts = [f"{ordinal}: {caption(scene)}" for ordinal, scene in zip(ORDINALS, scenes, strict=False)]
    return Question("describe_each", "describe each image.", "; ".join(parts))


def ask_num_images(rng: Random, scenes: Sequence[Scene], nth: int) -> Question:
    """`how many images are there?`"""
    return Question("num_images", "how many images are there?", NUMBERS[len(scenes)])


ImagesAsker = Callable[[Random, Sequence[Scene], int], Question | None]

IMAGES_QUESTIONS: dict[str, ImagesAsker] = {
    "which_image": ask_which_image,
    "describe_nth": ask_describe_nth,
    "colour_nth": ask_colour_nth,
    "describe_each": ask_describe_each,
    "num_images": ask_num_images,
    "count_nth": ask_count_nth,
}
