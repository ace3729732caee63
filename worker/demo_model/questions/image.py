"""Questions about one image. `where` names it among several (` in the second image`)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from worker.demo_model.questions.question import NUMBERS, Question, spelling
from worker.demo_model.scenes import COLOURS, SHAPES, Scene, Thing, relation, with_article

CAPTION_PROMPTS = ("describe the image.", "caption the image.", "what is in the image?", "describe this image.")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


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
