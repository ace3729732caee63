"""Questions about scenes and clips with their true answers, one small function per kind.

Every `ask_…` returns a `Question`, or None when the kind does not fit: there is no relation to ask about in a scene
of one shape. The tables map a kind's name to its function. Text is lower case; the tokenizer lowers what users type.
`where` names one image among several (` in the second image`), `nth` is the one that a question may pick out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from worker.demo_model.clips import Action, Clip
from worker.demo_model.scenes import COLOURS, SHAPES, Scene, Thing, relation, with_article

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth")

CAPTION_PROMPTS = ("describe the image.", "caption the image.", "what is in the image?", "describe this image.")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CLIP_CAPTION_PROMPTS = ("describe the video.", "what happens in the video?", "caption the video.")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked and what is true. `kind` is a key of one of the three tables of this package."""

    kind: str
    text: str
    answer: str


def spelling(rng: Random) -> str:
    """`colour` or `color`: users write both."""
    return "colour" if rng.random() < 0.6 else "color"


def caption(scene: Scene) -> str:
    """The one canonical caption: two things by their relation, three from left to right."""
    things = scene.things
    if len(things) == 1:
        return things[0].phrase
    if len(things) == 2:
        subject, other = things
        where = relation(subject, other)
        if where in ("right of", "below"):
            subject, other, where = other, subject, OPPOSITES[where]
        return f"{subject.phrase} {where} {other.phrase}"
    left, middle, right = sorted(things, key=lambda thing: thing.x)
    return f"{left.phrase}, {middle.phrase} and {right.phrase}"


def ask_caption(rng: Random, scene: Scene, where: str = "") -> Question:
    """`describe the image.`"""
    return Question("caption", rng.choice(CAPTION_PROMPTS), caption(scene))


def ask_colour(rng: Random, scene: Scene, where: str = "") -> Question | None:
    """`what colour is the star?`, of a shape that occurs once."""
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("colour", f"what {spelling(rng)} is the {thing.shape}{where}?", thing.colour)


def ask_shape(rng: Random, scene: Scene, where: str = "") -> Question:
    """`what shape is the red one?`"""
    thing = rng.choice(scene.things)
    return Question("shape", f"what shape is the {thing.colour} {rng.choice(('one', 'object'))}{where}?", thing.shape)


def ask_count(rng: Random, scene: Scene, where: str = "") -> Question:
    """`how many shapes are there?`"""
    template = rng.choice(("how many shapes are there{}?", "how many shapes{}?", "how many objects are there{}?"))
    return Question("count", template.format(where), NUMBERS[len(scene.things)])


def ask_count_of_shape(rng: Random, scene: Scene, where: str = "") -> Question:
    """`how many stars are there?`"""
    shape = rng.choice(scene.things).shape if rng.random() < 0.7 else rng.choice(SHAPES)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    num = sum(thing.shape == shape for thing in scene.things)
    return Question("count_of_shape", f"how many {plural} are there{where}?", NUMBERS[num])


def ask_exists(rng: Random, scene: Scene, where: str = "") -> Question:
    """`is there a star?` or `is there a red star?`; the wrong ones differ in one property only."""
    is_there = rng.random() < 0.5
    if rng.random() < 0.5:
        present = {thing.shape for thing in scene.things}
        shape = rng.choice(sorted(present)) if is_there else rng.choice([s for s in SHAPES if s not in present])
        return Question("exists", f"is there {with_article(shape)}{where}?", "yes" if is_there else "no")
    thing = rng.choice(scene.things)
    name = thing.name if is_there else _changed_name(rng, scene, thing)
    answer = "yes" if name in {other.name for other in scene.things} else "no"
    return Question("exists", f"is there {with_article(name)}{where}?", answer)


def _changed_name(rng: Random, scene: Scene, thing: Thing) -> str:
    if rng.random() < 0.5:
        present = {other.colour for other in scene.things}
        return f"{rng.choice([colour for colour in COLOURS if colour not in present])} {thing.shape}"
    return f"{thing.colour} {rng.choice([shape for shape in SHAPES if shape != thing.shape])}"


def ask_relation_holds(rng: Random, scene: Scene, where: str = "") -> Question | None:
    """`is the red star left of the blue cross?`"""
    if len(scene.things) < 2:
        return None
    for _ in range(8):
        subject, other = rng.sample(scene.things, 2)
        truth = relation(subject, other)
        if truth:
            asked = truth if rng.random() < 0.5 else OPPOSITES[truth]
            text = f"is the {subject.name} {asked} the {other.name}?"
            return Question("relation_holds", text, "yes" if asked == truth else "no")
    return None


def ask_what_is_there(rng: Random, scene: Scene, where: str = "") -> Question | None:
    """`what is left of the blue cross?`"""
    if len(scene.things) != 2:
        return None
    subject, other = rng.sample(scene.things, 2)
    return Question("what_is_there", f"what is {relation(subject, other)} the {other.name}?", subject.phrase)


def ask_background(rng: Random, scene: Scene, where: str = "") -> Question:
    """`what colour is the background?`"""
    return Question("background", f"what {spelling(rng)} is the background{where}?", scene.background)


ImageAsker = Callable[[Random, Scene, str], Question | None]

IMAGE_QUESTIONS: dict[str, ImageAsker] = {
    "caption": ask_caption,
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "count_of_shape": ask_count_of_shape,
    "exists": ask_exists,
    "relation_holds": ask_relation_holds,
    "what_is_there": ask_what_is_there,
    "background": ask_background,
}


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


def clip_caption(clip: Clip) -> str:
    """What happens in the clip, in one clause."""
    subject = with_article(f"{clip.first_colour} {clip.shape}")
    if clip.action is Action.MOVE:
        return f"{subject} moves {clip.direction}"
    if clip.action is Action.TURN:
        return f"{subject} turns {clip.last_colour}"
    return f"{subject} does not move"


def ask_motion(rng: Random, clip: Clip) -> Question | None:
    """`which way does the star move?`"""
    if clip.action is Action.TURN:
        return None
    template = rng.choice(("which way does the {} move?", "which direction does the {} move?"))
    return Question("motion", template.format(clip.shape), clip.direction or "it does not move")


def ask_clip_caption(rng: Random, clip: Clip) -> Question:
    """`what happens in the video?`"""
    return Question("clip_caption", rng.choice(CLIP_CAPTION_PROMPTS), clip_caption(clip))


def ask_colour_at_end(rng: Random, clip: Clip) -> Question:
    """`what colour is the star at the end?`"""
    text = f"what {spelling(rng)} is the {clip.shape} {rng.choice(('at the end', 'in the last frame'))}?"
    return Question("colour_at_end", text, clip.last_colour)


def ask_colour_at_start(rng: Random, clip: Clip) -> Question:
    """`what colour is the star at the start?`"""
    text = f"what {spelling(rng)} is the {clip.shape} {rng.choice(('at the start', 'in the first frame'))}?"
    return Question("colour_at_start", text, clip.first_colour)


def ask_colour_changes(rng: Random, clip: Clip) -> Question:
    """`does the star change colour?`"""
    answer = "yes" if clip.action is Action.TURN else "no"
    return Question("colour_changes", f"does the {clip.shape} change {spelling(rng)}?", answer)


def ask_which_moves(rng: Random, clip: Clip) -> Question | None:
    """`which object moves?`"""
    if clip.action is not Action.MOVE:
        return None
    return Question("which_moves", "which object moves?", f"the {clip.first_colour} {clip.shape}")


ClipAsker = Callable[[Random, Clip], Question | None]

CLIP_QUESTIONS: dict[str, ClipAsker] = {
    "motion": ask_motion,
    "clip_caption": ask_clip_caption,
    "colour_at_end": ask_colour_at_end,
    "colour_at_start": ask_colour_at_start,
    "colour_changes": ask_colour_changes,
    "which_moves": ask_which_moves,
}
