"""Families without a chat template: how GIT, BLIP-2 and PaliGemma are given a picture and, if any, one text.

In: a processor, decoded pictures, a text. Out: what the family's own processor makes of them. Knows no turns and no
jobs. What a family is told when there is nothing to say is its documented convention for captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import Blip2Processor, GitProcessor, PaliGemmaProcessor, ProcessorMixin

Encode = Callable[[ProcessorMixin, Sequence[Image.Image], str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Captioner:
    """One family's convention.

    family: its name, for messages.
    takes_questions: it was made to answer; the others only go on with a caption that the text begins.
    max_images: pictures per prompt; None: any number from 1.
    default_prompt: the text of a caption without a prompt; empty: none.
    encode: `(processor, pictures, text)` to the forward's arguments, batch 1. Raises ValueError for odd input.
    """

    family: str
    takes_questions: bool
    max_images: int | None
    default_prompt: str
    encode: Encode


def captioner_of(processor: ProcessorMixin) -> Captioner | None:
    """Return the convention of the processor's family; None when it is none of the known ones."""
    return next((captioner for kind, captioner in _CAPTIONERS.items() if isinstance(processor, kind)), None)


def _encode_git(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    """The text opens the caption: after the start token and without the end token that BERT's tokenizer adds.

    Without a text that is where `generate` starts from pixels alone.
    """
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    words = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    input_ids = torch.tensor([[start, *words]])
    pixels = processor.image_processor(list(pictures), return_tensors="pt")
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}


def _encode_blip2(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    encoded: Mapping[str, Any] = processor(images=list(pictures), text=text, return_tensors="pt")
    return encoded


def _encode_paligemma(processor: ProcessorMixin, pictures: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
    """Image tokens, then the text as prefix; the processor itself adds BOS and the closing line break."""
    prompt = processor.image_token * len(pictures) + text
    encoded: Mapping[str, Any] = processor(images=list(pictures), text=prompt, return_tensors="pt")
    return encoded


_CAPTIONERS: Mapping[type[ProcessorMixin], Captioner] = {
    GitProcessor: Captioner("GIT", False, 1, "", _encode_git),
    Blip2Processor: Captioner("BLIP-2", False, 1, "", _encode_blip2),
    PaliGemmaProcessor: Captioner("PaliGemma", True, None, "caption en", _encode_paligemma),
}
