"""Prompts of families without a chat template: one picture (or some), at most one text, the family's own convention.

In: one user's turn and decoded media. Out: tensors on the CPU. What such a model cannot be asked is InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from api_stub.contract.conversation import Role, TextPart, Turn
from api_stub.contract.job import Job, TaskName
from api_stub.contract.media_options import MediaOptions
from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia
from worker.models.captioner import Captioner
from worker.models.inputs import ModelInputs
from worker.prompting.pixel_trials import PixelLimits
from worker.prompting.processors import Processors, tensors_of


class SingleTurnPrompts:
    """Prepares prompts as a `Captioner` wants them. Called from many threads at once."""

    def __init__(self, processors: Processors, captioner: Captioner) -> None:
        self._processors = processors
        self._captioner = captioner

    @property
    def limits(self) -> PixelLimits:
        """None: these families' processors make the same size of every picture."""
        return PixelLimits()

    def check(self, job: Job) -> None:
        """Raise InvalidRequest for a kind of job that the family has no form for, before any medium is fetched."""
        family = self._captioner.family
        if job.messages is not None:
            raise InvalidRequest(f"messages: {family} has no chat template; send media and one text")
        if job.task is TaskName.VIDEO_QA:
            raise InvalidRequest(f"task: {family} takes images only, got {job.task.value}")
        if job.task is TaskName.VQA and not self._captioner.takes_questions:
            raise InvalidRequest(f"task: {family} makes captions and answers no questions, got {job.task.value}")
        self._check_number(len(job.media))

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        """Return the prompt's tensors. Raises InvalidRequest for anything but pictures and one text after them."""
        text = self._text(turns)
        pictures = [medium.pixels for medium in media if not isinstance(medium, DecodedClip)]
        if len(pictures) < len(media):
            raise InvalidRequest(f"media: {self._captioner.family} takes images only, got a video")
        self._check_number(len(pictures))
        assert options is None, "refused before: there are no limits"
        tensors = self._encode(pictures, text)
        return ModelInputs(tensors, num_images=len(pictures), num_media_tokens=self._num_media_tokens(tensors))

    def _num_media_tokens(self, tensors: Mapping[str, Tensor]) -> int:
        """Count the places of pictures among the prompt's tokens; GIT's pictures have none there."""
        token = getattr(self._processors.plain, "image_token", None)
        if token is None:
            return 0
        return int((tensors["input_ids"] == self._processors.plain.tokenizer.convert_tokens_to_ids(str(token))).sum())

    def _text(self, turns: Sequence[Turn]) -> str:
        texts = [part.text for turn in turns for part in turn.content if isinstance(part, TextPart)]
        is_plain = len(turns) == 1 and turns[0].role is Role.USER and len(texts) <= 1
        if not is_plain or (texts and not isinstance(turns[0].content[-1], TextPart)):
            raise InvalidRequest(f"messages: {self._captioner.family} has no chat template; send media and one text")
        return texts[0] if texts else ""

    def _check_number(self, num_images: int) -> None:
        most = self._captioner.max_images
        if num_images < 1 or (most is not None and num_images > most):
            wanted = "at least 1 image" if most is None else f"exactly {most} image"
            raise InvalidRequest(f"media: {self._captioner.family} takes {wanted}, got {num_images}")

    def _encode(self, pictures: Sequence[Image.Image], text: str) -> dict[str, Tensor]:
        """Literal control tokens are marked first; then the ids must hold no more of them than a harmless text's."""
        plain, marked, control = self._processors.plain, self._processors.marked, self._processors.control
        try:
            if not control.occur_in(text):
                return tensors_of(self._captioner.encode(plain, pictures, text))
            tensors = tensors_of(self._captioner.encode(marked, pictures, control.mark(text)))
            harmless = tensors_of(self._captioner.encode(plain, pictures, "x"))
        except ValueError as error:
            raise InvalidRequest(f"media: the model's processor refuses them: {error}") from error
        if self._processors.control_ids(tensors) != self._processors.control_ids(harmless):
            raise InvalidRequest("prompt: the text cannot be told apart from the model's control tokens")
        return tensors
