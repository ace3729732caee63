"""Makes the model's tensors out of a conversation, in the way its family wants to be asked.

In: turns and decoded media. Out: `ModelInputs` on the CPU. A model is asked through its chat template, or, when it has
none, by the convention of its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from api_stub.contract.conversation import Turn
from api_stub.contract.job import Job
from api_stub.contract.media_options import MediaOptions
from worker.errors import CannotStart
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.asked_pixels import AskedPixels
from worker.prompting.pixel_trials import PixelLimits
from worker.prompting.processors import Processors, cast
from worker.prompting.single_turn import SingleTurnPrompts
from worker.prompting.templated import TemplatedPrompts

NOTHING_ASKED: Final = MediaOptions()
#: As in the settings.
MAX_JOB_PIXELS: Final = 256_000_000


class PromptBuilder:
    """Prepares prompts for one loaded model. Called from many threads at once; nothing changes after construction.

    own: the worker's limits for pixels. max_job_pixels: of all pictures of a job, if they are enlarged.
    Raises CannotStart for a checkpoint that nobody knows how to ask, or not for these limits.
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
                f"VISIONQ_MODEL: {type(loaded.processor).__name__} has no chat template, nor is its family's way of "
                "asking known"
            )
        self._asked = AskedPixels(type(loaded.model).__name__, own, max_job_pixels)
        if not own.are_empty:
            self._asked.check_own(self.limits, has_clips=loaded.capabilities.native_video)

    @property
    def limits(self) -> PixelLimits:
        """How the processor can be asked for fewer or more pixels; found out by trial at the first look."""
        return self._prompts.limits

    def turns(self, job: Job) -> tuple[Turn, ...]:
        """Return the job's conversation, the checkpoint's caption prompt where a caption has none.

        Raises InvalidRequest for a kind of job that the model has no form for, before any medium is fetched.
        """
        if self._single_turn is not None:
            self._single_turn.check(job)
        self._limited(job.media_options)
        return job.turns(self._caption_prompt)

    def prepare(
        self, turns: Sequence[Turn], media: Sequence[DecodedMedia], options: MediaOptions | None = None
    ) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        Raises InvalidRequest when the model cannot be asked this, or its template or processor refuses it.
        """
        asked = self._limited(options)
        self._asked.check_room(asked, media)
        inputs = self._prompts.prepare(turns, media, asked)
        return replace(inputs, tensors=cast(inputs.tensors, self._dtype))

    def _limited(self, options: MediaOptions | None) -> MediaOptions | None:
        """Return the worker's limits and the job's together. Raises InvalidRequest."""
        has_any = options is not None and not options.are_empty
        return self._asked.of(options, self.limits if has_any else PixelLimits())
