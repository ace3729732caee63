"""Labels of captions for families without a chat template: a caption job's prompt, then the caption and its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import GitProcessor, PreTrainedConfig, ProcessorMixin

from worker.errors import InvalidRequest
from worker.media.types import DecodedClip, DecodedMedia
from worker.models.capabilities import probe
from worker.models.context import max_context
from worker.prompting.processors import ControlTokens, tensors_of
from worker.training.batch import IGNORED, Batch, Row, UnsafeTemplate, check_length, join_rows
from worker.training.example import Example

#: Families whose labels are proven by tests.
_PROVEN = (GitProcessor,)


class CaptionEncoder:
    """Encodes pictures with captions for one captioner (GIT): learnt are the caption's tokens and the end token.

    eos_token_ids: the tokens at which generation stops, as serving reads them.
    Raises UnsafeTemplate for another family.
    """

    def __init__(self, processor: ProcessorMixin, config: PreTrainedConfig, *, eos_token_ids: Collection[int]) -> None:
        captioner = probe(processor, config).captioner
        if captioner is None or not isinstance(processor, _PROVEN):
            raise UnsafeTemplate(f"captions for {type(processor).__name__} are not supported: GIT's only")
        tokenizer = processor.tokenizer
        if not eos_token_ids:
            raise UnsafeTemplate("the model has no token that ends a caption")
        own = tokenizer.eos_token_id
        self.max_length = max_context(config) or tokenizer.model_max_length
        self._processor, self._captioner, self._tokenizer = processor, captioner, tokenizer
        self._control = ControlTokens(tokenizer)
        self._end = int(own) if own in eos_token_ids else min(eos_token_ids)
        self._pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def row(self, example: Example, text: str | None, media: Sequence[DecodedMedia]) -> Row:
        """Encode one example; as in `Encoder`."""
        if text is None:
            raise InvalidRequest(f"messages: {self._captioner.family} has no chat template; it learns captions")
        pictures = [medium.pixels for medium in media if not isinstance(medium, DecodedClip)]
        if len(pictures) < len(media):
            raise InvalidRequest(f"{self._captioner.family} takes pictures only, got a clip")
        most = self._captioner.max_images
        if most is not None and len(pictures) != most:
            raise InvalidRequest(f"{self._captioner.family} takes {most} picture, got {len(pictures)}")
        words = self._words(text)
        prompt = tensors_of(self._captioner.encode(self._processor, pictures, self._captioner.default_prompt))
        ids = torch.cat([prompt["input_ids"], torch.tensor([[*words, self._end]])], dim=1)
        labels = ids.clone()
        labels[:, : prompt["input_ids"].shape[1]] = IGNORED
        check_length(ids.shape[1], self.max_length)
        return Row({**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)

    def join(self, rows: Sequence[Row]) -> Batch:
        """Return the rows as one batch; as in `Encoder`."""
        return join_rows(rows, self._pad_id, has_row_per_example=False)

    def _words(self, text: str) -> list[int]:
        if self._control.occur_in(text):
            raise InvalidRequest(f"the text has a control token of the model in it: {text[:80]!r}")
        words: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not words:
            raise InvalidRequest(f"the text has no tokens: {text[:80]!r}")
        if self._tokenizer.unk_token_id in words:
            raise InvalidRequest(f"the model's tokenizer does not know all of the text: {text[:80]!r}")
        return words
