"""Makes the model's tensors out of a conversation, in the way its family wants to be asked.

In: turns and decoded media. Out: `ModelInputs` on the CPU. A model is asked through its chat template, or, when it has
none, by the convention of its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from api_stub.contract.conversation import Turn
from api_stub.contract.job import Job
from worker.errors import CannotStart
from worker.media.types import DecodedMedia
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.processors import Processors, cast
from worker.prompting.single_turn import SingleTurnPrompts
from worker.prompting.templated import TemplatedPrompts


class PromptBuilder:
    """Prepares prompts for one loaded model. Called from many threads at once; nothing changes after construction.

    Raises CannotStart for a checkpoint that nobody knows how to ask.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._dtype = loaded.dtype
        self._caption_prompt = loaded.capabilities.default_caption_prompt
        self._single_turn: SingleTurnPrompts | None = None
        processors = Processors(loaded)
        if loaded.capabilities.has_chat_template:
            self._prompts: SingleTurnPrompts | TemplatedPrompts = TemplatedPrompts(
                processors, loaded.capabilities, loaded.tokenizer.bos_token
            )
        elif loaded.capabilities.captioner is not None:
            self._prompts = self._single_turn = SingleTurnPrompts(processors, loaded.capabilities.captioner)
        else:
            raise CannotStart(
                f"VISIONQ_MODEL: {type(loaded.processor).__name__} has no chat template, nor is its family's way of "
                "asking known"
            )

    def turns(self, job: Job) -> tuple[Turn, ...]:
        """Return the job's conversation, the checkpoint's caption prompt where a caption has none.

        Raises InvalidRequest for a kind of job that the model has no form for, before any medium is fetched.
        """
        if self._single_turn is not None:
            self._single_turn.check(job)
        return job.turns(self._caption_prompt)

    def prepare(self, turns: Sequence[Turn], media: Sequence[DecodedMedia]) -> ModelInputs:
        """Return the prompt's tensors. `media` are in the order of the parts that are not text.

        Raises InvalidRequest when the model cannot be asked this, or its template or processor refuses it.
        """
        inputs = self._prompts.prepare(turns, media)
        return replace(inputs, tensors=cast(inputs.tensors, self._dtype))
