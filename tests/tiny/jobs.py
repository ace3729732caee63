"""Prompts for tiny checkpoints, with and without images, and what sequential `generate` answers to them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from tests.tiny.families import CHAT_FAMILIES, CORPUS, picture
from worker.models.inputs import ModelInputs


@dataclass(frozen=True)
class TinyModel:
    """A loaded tiny checkpoint."""

    name: str
    directory: Path

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.directory).eval()

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.directory)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def inputs(self, text: str, images: Sequence[Image.Image] = (), *, is_continuation: bool = False) -> ModelInputs:
        """Return the model's inputs for a user's turn of images and text, or for a bare text without turns."""
        with warnings.catch_warnings():
            # PaliGemma's processor makes labels in a way NumPy 2 warns about.
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            encoded = self._encode(text, list(images))
        tensors = {name: value for name, value in encoded.items() if torch.is_tensor(value) and name != "labels"}
        return ModelInputs(tensors, num_images=len(images), is_continuation=is_continuation)

    def generate(self, inputs: ModelInputs, max_new_tokens: int, **options: Any) -> list[int]:
        """Return the new tokens of `model.generate`, alone and greedy unless `options` say else."""
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs.tensors, max_new_tokens=max_new_tokens, **{"do_sample": False, **options}
            )
        new: list[int] = ids[0, inputs.num_prompt_tokens :].tolist()
        return new

    def _encode(self, text: str, images: list[Image.Image]) -> Any:
        pictures: Any = images or None
        if self.name in CHAT_FAMILIES:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            pictures = [images] if images and self.name != "llava" else pictures
        elif self.name == "paligemma":
            text = "<image>" * len(images) + text
        return self.processor(text=text, images=pictures, return_tensors="pt")


def mixed_inputs(tiny: TinyModel, count: int, seed: int = 7) -> list[ModelInputs]:
    """Return `count` prompts of different lengths with 0 to 4 images; one image each where a family takes one."""
    chance = random.Random(seed)
    prompts = []
    for number in range(count):
        num_images = chance.choice([0, 1, 1, 2, 4]) if tiny.name in CHAT_FAMILIES else 1
        images = [
            picture(100 * number + i, chance.choice([32, 40, 64]), chance.choice([32, 48, 64]))
            for i in range(num_images)
        ]
        words = chance.choice(CORPUS).split()
        prompts.append(tiny.inputs(" ".join(words[: chance.randint(1, len(words))]), images))
    return prompts
