"""The jobs of the engine bench: questions about pictures of random patches, drawn from a seed.

Prompts are built as the worker builds them, so that every mode gets what a served model would get.
"""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
import torch
from PIL import Image

from api_stub.contract.conversation import ImagePart, Role, TextPart, Turn
from worker.bench.run import BenchJob
from worker.media.types import DecodedImage
from worker.models.inputs import ModelInputs
from worker.models.loader import LoadedModel
from worker.prompting.prepare import PromptBuilder

WORDS: Final = ("what", "is", "the", "colour", "of", "this", "circle", "how", "many", "red", "squares", "are", "there")
#: Width and height: one size, so that static batches can be made of any family's tensors.
PICTURE_SIZE: Final = (640, 480)


def make_jobs(
    loaded: LoadedModel, num_jobs: int, new_tokens: tuple[int, int], num_images: int, seed: int = 0
) -> list[BenchJob]:
    """Return jobs whose questions have 4 to 40 words and which want `new_tokens` tokens, both uniform."""
    rng = Random(seed)
    prompts = PromptBuilder(loaded)
    return [
        BenchJob(f"job-{number}", _prompt(prompts, rng, num_images), rng.randint(*new_tokens))
        for number in range(num_jobs)
    ]


def long_job(loaded: LoadedModel, num_tokens: int, max_new_tokens: int, seed: int = 1) -> BenchJob:
    """Return a job with a prompt of `num_tokens` text tokens."""
    rng = Random(seed)
    text = " ".join(rng.choice(WORDS) for _ in range(num_tokens))
    ids = torch.tensor([loaded.tokenizer.encode(text, add_special_tokens=False)[:num_tokens]])
    return BenchJob("long", ModelInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), max_new_tokens)


def _prompt(prompts: PromptBuilder, rng: Random, num_images: int) -> ModelInputs:
    words = [rng.choice(WORDS) for _ in range(rng.randint(4, 40))]
    pictures = [_picture(rng) for _ in range(num_images)]
    parts = [ImagePart(uri=f"s3://bench/{number}.png") for number in range(num_images)]
    turn = Turn(role=Role.USER, content=(*parts, TextPart(text=" ".join(words))))
    return prompts.prepare([turn], pictures)


def _picture(rng: Random) -> DecodedImage:
    # Few large patches: fine noise looks the same to a model that averages over it.
    patches = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return DecodedImage(Image.fromarray(patches).resize(PICTURE_SIZE, Image.Resampling.NEAREST))
