"""Questions about scenes and clips with their true answers, one small function per kind.

Every `ask_…` returns a `Question`, or None when the kind does not fit: there is no relation to ask about in a scene
of one shape. The tables map a kind's name to its function. Text is lower case; the tokenizer lowers what users type.
"""

from __future__ import annotations

from worker.demo_model.questions.clip import CLIP_QUESTIONS, clip_caption
from worker.demo_model.questions.image import IMAGE_QUESTIONS, caption
from worker.demo_model.questions.images import IMAGES_QUESTIONS
from worker.demo_model.questions.question import Question

__all__ = ["CLIP_QUESTIONS", "IMAGES_QUESTIONS", "IMAGE_QUESTIONS", "Question", "caption", "clip_caption"]
