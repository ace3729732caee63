"""Scenes, clips and questions: reproducible, unambiguous, and true."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from worker.demo_model.clips import DIRECTIONS, Action, make_clip
from worker.demo_model.learning.conversations import clip_conversation, image_conversation, images_conversation
from worker.demo_model.questions import CLIP_QUESTIONS, IMAGE_QUESTIONS, caption, clip_caption
from worker.demo_model.scenes import (
    CANVAS,
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    draw,
    draw_varied,
    make_dense_scene,
    make_scene,
    relation,
)


def thing(colour: str, shape: str, x: float, y: float) -> Thing:
    return Thing(colour, shape, x, y, 9.0, COLOURS[colour])


def scene(*things: Thing) -> Scene:
    return Scene(things, "white", (245, 245, 245))


def test_the_same_seed_gives_the_same_scene_and_the_same_pixels() -> None:
    first, second = (make_scene(Random(5)) for _ in range(2))
    assert first == second
    assert make_scene(Random(6)) != first
    assert np.array_equal(draw_varied(first, Random(5)), draw_varied(second, Random(5)))


def test_every_thing_lies_inside_the_canvas_and_two_things_are_always_related() -> None:
    rng = Random(0)
    for _ in range(300):
        things = make_scene(rng).things
        assert all(t.radius < t.x < CANVAS - t.radius and t.radius < t.y < CANVAS - t.radius for t in things)
        assert len({t.colour for t in things}) == len(things)
        if len(things) == 2:
            assert relation(*things) is not None


def test_a_dense_scene_has_at_most_five_things_that_do_not_overlap() -> None:
    rng = Random(0)
    for _ in range(100):
        things = make_dense_scene(rng).things
        assert 2 <= len(things) <= 5
        assert all((a.x - b.x) ** 2 + (a.y - b.y) ** 2 > 22**2 for i, a in enumerate(things) for b in things[:i])


def test_captions_name_relations_from_the_left_and_from_above() -> None:
    red, blue = thing("red", "circle", 15, 30), thing("blue", "square", 48, 32)
    assert caption(scene(blue, red)) == "a red circle left of a blue square"
    high, low = thing("orange", "star", 30, 14), thing("blue", "cross", 32, 48)
    assert caption(scene(low, high)) == "an orange star above a blue cross"
    assert caption(scene(thing("pink", "star", 30, 50), blue, red)) == "a red circle, a pink star and a blue square"


def test_relation_is_unclear_on_the_diagonal() -> None:
    assert relation(thing("red", "star", 15, 15), thing("blue", "star", 45, 45)) is None


def test_yes_and_no_questions_are_true_and_balanced() -> None:
    rng = Random(3)
    pair = scene(thing("red", "circle", 15, 30), thing("blue", "square", 48, 32))
    answers: dict[str, set[str]] = {}
    for _ in range(600):
        for kind in ("exists", "relation_holds"):
            question = IMAGE_QUESTIONS[kind](rng, pair, "")
            assert question is not None
            answers.setdefault(question.text, set()).add(question.answer)
    assert all(len(given) == 1 for given in answers.values())
    assert answers["is the red circle left of the blue square?"] == {"yes"}
    assert answers["is the blue square left of the red circle?"] == {"no"}
    assert answers["is there a red circle?"] == {"yes"}
    assert answers["is there a red square?"] == {"no"}


def test_a_kind_that_does_not_fit_gives_no_question() -> None:
    rng = Random(0)
    twins = scene(thing("red", "star", 15, 30), thing("blue", "star", 48, 32))
    assert IMAGE_QUESTIONS["colour"](rng, twins, "") is None
    assert IMAGE_QUESTIONS["relation_holds"](rng, scene(twins.things[0]), "") is None
    assert CLIP_QUESTIONS["which_moves"](rng, make_clip(rng, 4, Action.STILL)) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_moving_shape_ends_where_the_answer_says(seed: int) -> None:
    clip = make_clip(Random(seed), 8, Action.MOVE)
    first, last = clip.frames[0].things[0], clip.frames[-1].things[0]
    dx, dy = DIRECTIONS[str(clip.direction)]
    assert (last.x - first.x) * dx + (last.y - first.y) * dy > 17
    assert clip_caption(clip) == f"{first.phrase} moves {clip.direction}"


def test_a_turning_shape_changes_its_colour_once() -> None:
    clip = make_clip(Random(1), 6, Action.TURN)
    colours = [frame.things[0].colour for frame in clip.frames]
    assert colours == sorted(colours, key=[clip.first_colour, clip.last_colour].index)
    assert set(colours) == {clip.first_colour, clip.last_colour}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_at_its_place(shape: str) -> None:
    for size in (64, 200):
        pixels = draw(scene(thing("red", shape, 20, 40)), size)
        y, x = (round(v * size / CANVAS) for v in (40, 20))
        assert tuple(pixels[y, x]) == COLOURS["red"]
        assert tuple(pixels[2, size - 3]) == (245, 245, 245)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        draw(scene(replace(thing("red", "star", 20, 40), shape="hexagon")))


def test_conversations_show_their_pictures_before_they_ask_and_never_ask_twice() -> None:
    rng = Random(9)
    for _ in range(100):
        for talk in (image_conversation(rng), images_conversation(rng), clip_conversation(rng)):
            assert talk[0].scenes
            assert all(turn.scenes == () for turn in talk[1:]) or len(talk[0].scenes) == 1
            texts = [turn.question.text for turn in talk]
            assert len(set(texts)) == len(texts) or any(turn.scenes for turn in talk[1:])


def test_a_wanted_kind_is_the_only_one_asked() -> None:
    rng = Random(2)
    assert [t.question.kind for t in image_conversation(rng, 1, kinds=["what_is_there"])] == ["what_is_there"]
    assert [t.question.kind for t in images_conversation(rng, 1, kinds=["which_image"])] == ["which_image"]
    motion = clip_conversation(rng, 1, kinds=["motion"], num_frames=5)
    assert (motion[0].question.kind, len(motion[0].scenes)) == ("motion", 5)
