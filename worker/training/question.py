"""What a model is asked about an example in an evaluation, as serving would ask, and the answers that are right."""

from __future__ import annotations

from collections.abc import Sequence

from api_stub.contract.conversation import TextPart, Turn
from api_stub.contract.job import CaptionJob
from worker.prompting.prepare import PromptBuilder
from worker.training.example import Example


def question_of(prompts: PromptBuilder, example: Example) -> tuple[Sequence[Turn], tuple[str, ...]]:
    """Return the conversation up to the answer, and the right answers: captions, or the last assistant's turn.

    Raises InvalidRequest for what the model cannot be asked.
    """
    if example.messages is None:
        job = CaptionJob(media=tuple(f"s3://data/{number}" for number in range(len(example.files))))
        return prompts.turns(job), example.texts
    *before, last = example.messages
    return before, ("".join(part.text for part in last.content if isinstance(part, TextPart)),)
