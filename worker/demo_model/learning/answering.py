"""Asks a checkpoint through the real path: stock processor, chat template, greedy `generate`. Judges no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from worker.demo_model.learning.exam import Item

# The longest true answer, "first: … left of …; second: …; third: …", has 35 tokens.
MAX_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Answerer:
    """A loaded checkpoint. `processor` and `model` are stock transformers objects, which carry no types."""

    processor: Any
    model: Any

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Answerer:
        """Load a directory; `dtype` because half precision is slower on a CPU. Raises OSError when it is none."""
        processor = AutoProcessor.from_pretrained(checkpoint)
        processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
        return cls(processor, model)

    @property
    def num_parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(weight.numel() for weight in self.model.parameters())

    @torch.inference_mode()
    def answer(self, items: Sequence[Item]) -> list[str]:
        """Greedy answers to one batch, in order."""
        texts = [self.processor.apply_chat_template(item.messages, add_generation_prompt=True) for item in items]
        pictures = [[Image.fromarray(pixels) for pixels in item.pictures] for item in items]
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
