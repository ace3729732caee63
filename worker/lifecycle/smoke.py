"""The smoke set of a checkpoint: a few pictures with right answers, which it must give before it may serve.

Training leaves it in the checkpoint's manifest. Asked through the engine that is going to serve, with greedy decoding.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Final

from PIL import Image

from api_stub.contract.sampling import SamplingParams
from worker.engine.request import GenerationRequest
from worker.errors import CannotStart, RequestError
from worker.lifecycle.self_test import Answering, check_finish
from worker.media.types import DecodedImage
from worker.models.manifest import SmokeQuestion
from worker.prompting.prepare import PromptBuilder

TIMEOUT_S: Final = 600.0


def ask(engine: Answering, prompts: PromptBuilder, questions: Sequence[SmokeQuestion]) -> None:
    """Ask all questions. Raises CannotStart for a wrong answer, EngineDead and GenerationFailed for none."""
    requests = []
    for number, question in enumerate(questions):
        pictures = [DecodedImage(_picture(text)) for text in question.pictures]
        try:
            inputs = prompts.prepare(question.turns, pictures)
        except RequestError as error:
            raise CannotStart(f"smoke set: question {number + 1} cannot be asked: {error}") from error
        sampling = SamplingParams(max_new_tokens=question.max_new_tokens, temperature=0.0, seed=0)
        requests.append(GenerationRequest(f"smoke-{number}", inputs, sampling))
    texts = {request.request_id: "" for request in requests}
    for output in engine.generate(requests, TIMEOUT_S):
        texts[output.request_id] += output.text
        check_finish(output.finish)
    for number, (text, question) in enumerate(zip(texts.values(), questions, strict=True)):
        if question.is_wrong(text):
            right = " or ".join(repr(answer[:200]) for answer in question.answers)
            raise CannotStart(f"smoke set: question {number + 1} is answered {text[:200]!r}, right is {right}")


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
