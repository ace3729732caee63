"""Turns a conversation and its media into the model's input tensors, in the prompt format of its family.

In: turns and decoded media. Out: `ModelInputs` on the CPU. The prompt comes from the model's chat template or, if it
has none, from its family's convention: pictures and at most one text. What a model has no format for is InvalidRequest.
`trial_prompts` are the prompts with which the engine tests its back ends at boot: one of every kind that the model
supports, about noise, so that every pixel matters. Knows no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from api_stub.contract.conversation import Role, TextPart, Turn
from api_stub.contract.job import CaptionJob, PromptJob, TaskName, VideoQaJob, VqaJob
from api_stub.contract.media import MediaOptions
from worker.errors import CannotStart, InvalidRequest
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia
from worker.models.capabilities import Capabilities
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.models.templates import Captioner
from worker.prompting.pixel_limits import PixelLimits, PixelPolicy
from worker.prompting.processors import Processors, cast, tensors_of
from worker.prompting.templated import TemplatedPrompts

logger = logging.getLogger(__name__)

NOTHING_ASKED: Final = MediaOptions()
#: As in the settings.
MAX_JOB_PIXELS: Final = 256_000_000
#: Frames and seconds of the clip; so long that its time positions exceed those of the text after it.
CLIP_FRAMES: Final = 4
CLIP_S: Final = 120.0
QUESTION: Final = "What is to be seen here, and what is it next to?"


class PromptBuilder:
    """Prepares prompts for one loaded model. Immutable; any thread.

    own: the worker's own limits of pixels per picture.
    max_job_pixels: limit of all pictures of a job, if they are enlarged.
    Raises CannotStart for a checkpoint without a known prompt format, or whose processor does not support these limits.
    """

    def __init__(
        self, loaded: LoadedModel, own: MediaOptions = NOTHING_ASKED, max_job_pixels: int = MAX_JOB_PIXELS
    ) -> None:
        self._dtype = loaded.dtype
        self._caption_prompt = loaded.capabilities.default_caption_prompt
        self._single_turn: SingleTurnPrompts | None = None
        processors = Processors(loaded)
        if loaded.capabilities.has_chat_template:
            self._prompts: SingleTurnPrompts | TemplatedPrompts = TemplatedPrompts(
                processors, loaded.capabilities, loaded.model.config, loaded.tokenizer.bos_token
            )
        elif loaded.capabilities.captioner is not None:
            self._prompts = self._single_turn = SingleTurnPrompts(processors, loaded.capabilities.captioner)
        else:
            raise CannotStart(
                f"VISIONQ_MODEL: {type(loaded.processor).__name__} has no chat template, and its family's prompt "
                "format is not known"
            )
        self._pixel_policy = PixelPolicy(type(loaded.model).__name__, own, max_job_pixels)
        if not own.are_empty:
            self._pixel_policy.check_own(self.limits, has_clips=loaded.capabilities.native_video)

    @property
    def limits(self) -> PixelLimits:
        """The limits of pixels that the processor supports; tested at the first access, which takes about a second."""
        return self._prompts.limits

    def turns(self, job: PromptJob) -> tuple[Turn, ...]:
        """Return the job's conversation, with the checkpoint's default prompt for a caption without one.

        Raises InvalidRequest for a kind of job that the model does not support, before any media are fetched.
        """
        if self._single_turn is not None:
            self._single_turn.check(job)
        self._limited(job.media_options)
        return job.turns(self._caption_prompt)

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        Raises InvalidRequest when the model does not support it, or its template or processor refuses it.
        """
        asked = self._limited(options)
        self._pixel_policy.check_enlarged(asked, media)
        inputs = self._prompts.prepare(turns, media, asked)
        return replace(inputs, tensors=cast(inputs.tensors, self._dtype))

    def _limited(self, options: MediaOptions | None) -> MediaOptions | None:
        """Combine the worker's limits and the job's. Raises InvalidRequest."""
        has_any = options is not None and not options.are_empty
        return self._pixel_policy.of(options, self.limits if has_any else PixelLimits())


def trial_prompts(prompts: PromptBuilder, capabilities: Capabilities) -> list[ModelInputs]:
    """Return prompts of different lengths: with one picture, several, none, and a clip where the model supports clips.

    Kinds that the model does not support are left out.
    """
    prepared = []
    for job, media in _jobs(capabilities):
        try:
            prepared.append(prompts.prepare(prompts.turns(job), media))
        except InvalidRequest as refusal:
            logger.info(
                "trial prompt not supported by the model", extra={"action": "engine.prove", "reason": str(refusal)}
            )
    return prepared


def _jobs(capabilities: Capabilities) -> Sequence[tuple[PromptJob, Sequence[DecodedMedia]]]:
    small, wide = DecodedImage(_noise(1, 64, 64)), DecodedImage(_noise(2, 96, 48))
    jobs: list[tuple[PromptJob, Sequence[DecodedMedia]]] = [
        (CaptionJob(media=_uris(1)), [small]),
        (VqaJob(media=_uris(2), question=QUESTION), [wide, small]),
        (VqaJob(question=QUESTION), []),
    ]
    if capabilities.native_video:
        jobs.append((VideoQaJob(media=_uris(1), question="What moves?"), [_clip()]))
        jobs.append((VideoQaJob(media=_uris(2), question=QUESTION), [wide, _clip()]))
    return jobs


def _uris(count: int) -> tuple[str, ...]:
    return tuple(f"s3://trial/{number}" for number in range(count))


def _clip() -> DecodedClip:
    frames = tuple(_noise(10 + number, 64, 64) for number in range(CLIP_FRAMES))
    times = tuple(CLIP_S * number / CLIP_FRAMES for number in range(CLIP_FRAMES))
    return DecodedClip(frames, times, CLIP_S, fps=25.0)


def _noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class SingleTurnPrompts:
    """Prepares prompts in the format of a `Captioner`. Any thread."""

    def __init__(self, processors: Processors, captioner: Captioner) -> None:
        self._processors = processors
        self._captioner = captioner

    @property
    def limits(self) -> PixelLimits:
        """Empty: these families' processors resize every picture to one size."""
        return PixelLimits()

    def check(self, job: PromptJob) -> None:
        """Raise InvalidRequest for a kind of job that the family does not support, before any media are fetched."""
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
        assert options is None, "jobs with options are refused before"
        tensors = self._encode(pictures, text)
        return ModelInputs(tensors, num_images=len(pictures), num_media_tokens=self._num_media_tokens(tensors))

    def _num_media_tokens(self, tensors: Mapping[str, Tensor]) -> int:
        """Count the prompt's image tokens; GIT has none."""
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
        """Encode a prompt. Control tokens in the text are marked first, and the ids are compared with those of a text
        without any: they must hold equally many control tokens.
        """
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
