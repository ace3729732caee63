"""Questions about a clip."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from worker.demo_model.clips import Action, Clip
from worker.demo_model.questions.question import Question, spelling
from worker.demo_model.scenes import with_article

CLIP_CAPTION_PROMPTS = ("describe the video.", "what happens in the video?", "caption the video.")


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
