"""One prompt about one plain picture, straight into the engine: warms a worker up and tells whether the model answers.

No job, no ledger, no events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from PIL import Image

from api_stub.contract.job import CaptionJob
from api_stub.contract.sampling import SamplingParams
from worker.answers import Answers
from worker.engine.engine import Engine
from worker.engine.request import Finish, GenerationRequest
from worker.errors import EngineDead, GenerationFailed
from worker.media.types import DecodedImage
from worker.prompting.prepare import PromptBuilder
from worker.streaming.outgoing import AttemptStream

PICTURE_SIZE: Final = 64
PICTURE_COLOUR: Final = (200, 120, 40)
MAX_NEW_TOKENS: Final = 16
TIMEOUT_S: Final = 600.0  # a large model tunes kernels on its first prompt


@dataclass(frozen=True, slots=True)
class TriedOut:
    """What the model said, the counts and times of saying it, and the tokens that the picture cost."""

    text: str
    finish: Finish
    num_media_tokens: int


def try_out(engine: Engine, prompts: PromptBuilder, answers: Answers, timeout_s: float = TIMEOUT_S) -> TriedOut:
    """Ask once and wait; `answers` must be fed with the engine's outputs. One caller at a time.

    Raises the WorkerError that prevents an answer.
    """
    turns = prompts.turns(CaptionJob(media=("s3://try-out/picture",)))
    picture = DecodedImage(Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), PICTURE_COLOUR))
    inputs = prompts.prepare(turns, [picture])
    # A lost stream: nothing of this goes to Redis.
    answer = answers.open("try-out", AttemptStream("try-out", fence=0, is_lost=True))
    try:
        sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=0)
        engine.submit(GenerationRequest(answer.request_id, inputs, sampling))
        finish = answer.wait(timeout_s)
        if finish is None:
            engine.cancel(answer.request_id)
    finally:
        answers.close(answer)
    if finish is None:
        raise EngineDead(f"no answer within {timeout_s:.0f} s")
    if finish.error is not None:
        raise GenerationFailed(finish.error)
    return TriedOut(answer.text, finish, inputs.num_media_tokens)
