"""The encoder of a model's recipe, and the examples that do not fit the model, found before the first step.

In: a processor and a config; examples. Out: an `Encoder`; batches with labels; findings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from worker.errors import InvalidRequest
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia
from worker.training.batch import IGNORED, Batch, Encoder, Row, UnsafeTemplate
from worker.training.caption_labels import CaptionEncoder
from worker.training.chat_labels import ChatEncoder
from worker.training.dataset import METADATA, Dataset, Example, Finding
from worker.training.files import DataFile

__all__ = [
    "IGNORED",
    "Batch",
    "CaptionEncoder",
    "ChatEncoder",
    "Encoder",
    "Recipe",
    "Row",
    "UnsafeTemplate",
    "check_fits",
    "encode",
    "encoder_for",
]

Recipe = Literal["auto", "captioner", "chat"]


def encoder_for(
    processor: ProcessorMixin,
    config: PreTrainedConfig,
    recipe: Recipe = "auto",
    *,
    eos_token_ids: Collection[int],
    caption_prompt: str | None = None,
) -> Encoder:
    """Return the encoder; `auto` takes the chat template where there is one.

    processor: its template is the one that serving uses (`models.templates.settle_template`). eos_token_ids: of
    `models.generation_defaults.eos_token_ids`. caption_prompt: what captions answer in a chat; None: as caption jobs.
    Raises UnsafeTemplate when labels cannot be derived.
    """
    is_chat = recipe == "chat" or (recipe == "auto" and processor.chat_template is not None)
    if is_chat:
        return ChatEncoder(processor, config, eos_token_ids=eos_token_ids, caption_prompt=caption_prompt)
    return CaptionEncoder(processor, config, eos_token_ids=eos_token_ids)


def encode(
    encoder: Encoder,
    examples: Sequence[Example],
    texts: Sequence[str | None],
    media: Sequence[Sequence[DecodedMedia]],
) -> Batch:
    """Encode examples as one batch; `texts` and `media` have an entry per example, as in `Encoder.row`."""
    return encoder.join([encoder.row(*each) for each in zip(examples, texts, media, strict=True)])


def check_fits(
    dataset: Dataset, encoder: Encoder, should_stop: Callable[[], None] = lambda: None
) -> tuple[Finding, ...]:
    """Return what the model cannot learn: texts that are too long, roles or pictures that its template refuses, ….

    Encodes every caption and conversation once, with blank pictures of the true sizes. `should_stop` raises to abort.
    """
    findings = []
    for example in sorted((*dataset.train, *dataset.validation), key=lambda one: one.line):
        media = [_blank(dataset.files[name]) for name in example.files]
        for text in example.texts or (None,):
            should_stop()
            try:
                encoder.row(example, text, media)
            except InvalidRequest as error:
                findings.append(Finding(METADATA, example.line, str(error)))
    return tuple(findings)


def _blank(file: DataFile) -> DecodedMedia:
    """Return a medium of the same size without content."""
    pictures = tuple(Image.new("RGB", size) for size in file.sizes)
    if file.kind is MediaKind.IMAGE:
        return DecodedImage(pictures[0])
    return DecodedClip(pictures, file.timestamps_s, file.duration_s, file.fps)
