"""The model: a stock Idefics2 of 2.69 M parameters with its stock processor.

64 × 64 images in 16 patches of 16 × 16 → vision tower 192 wide, 4 layers → perceiver, 16 latents, one layer → Mistral
128 wide, 3 layers. Only sizes and initial values are chosen here; the code is transformers'.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    MistralConfig,
)

from worker.demo_model.learning.initialisation import initialise
from worker.demo_model.learning.tokenizer import IMAGE_TOKEN, MAX_LENGTH
from worker.demo_model.scenes import CANVAS

PATCH = 16
# One latent per patch: each can learn to carry what lies in its grid cell.
GRID = CANVAS // PATCH
NUM_LATENTS = GRID * GRID
VISION_WIDTH, VISION_LAYERS = 192, 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_MLP_WIDTH = 128, 3, 320
HEAD_WIDTH = 32

# Roles as "User: …<end_of_utterance>\nAssistant:"; a space before every text, none before an image.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}"
    "{% elif c['type'] == 'text' %}{{ ' ' + c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the vision side makes of `n` images: `patches` `[n, 16, 192]`, `latents` `[n, 16, 128]`."""

    patches: Tensor
    latents: Tensor


def build_model(tokenizer: Any) -> Any:
    """A freshly initialised model in float32; draws from torch's global generator."""
    shared = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Idefics2Config(
        vision_config=_vision_config(),
        perceiver_config=_perceiver_config(),
        text_config=MistralConfig(**_text_config(len(tokenizer)), **shared),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=True,
        **shared,
    )
    model = Idefics2ForConditionalGeneration(config)
    initialise(model, GRID)
    return model


def build_processor(tokenizer: Any) -> Any:
    """The stock processor: 64 × 64, values in −1 … 1, 16 tokens per image, no splitting."""
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": CANVAS, "longest_edge": CANVAS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_image_splitting=False,
    )
    return Idefics2Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=NUM_LATENTS, chat_template=CHAT_TEMPLATE
    )


def load(directory: Path) -> tuple[Any, Any]:
    """Model (float32, training mode) and processor of a saved checkpoint."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.train(), AutoProcessor.from_pretrained(directory)


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write a half-precision checkpoint that the Auto classes load; the model in memory keeps its precision."""
    copy.deepcopy(model).half().save_pretrained(directory)
    processor.save_pretrained(directory)


def image_features(model: Any, pixels: Tensor) -> ImageFeatures:
    """Run the vision tower and the connector over `[n, 3, 64, 64]`."""
    output = model.model.get_image_features(pixels[None], None, return_dict=True)
    latents = output.pooler_output[0].view(len(pixels), NUM_LATENTS, -1)
    return ImageFeatures(output.last_hidden_state, latents)


def _vision_config() -> dict[str, Any]:
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_WIDTH * 3,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_WIDTH // HEAD_WIDTH,
        "image_size": CANVAS,
        "patch_size": PATCH,
        "initializer_range": 0.05,
    }


def _perceiver_config() -> dict[str, Any]:
    return {
        "hidden_size": TEXT_WIDTH,
        "rms_norm_eps": 1e-5,
        "resampler_n_latents": NUM_LATENTS,
        "resampler_depth": 1,
        "resampler_n_heads": TEXT_WIDTH // HEAD_WIDTH,
        "resampler_head_dim": HEAD_WIDTH,
        "num_key_value_heads": TEXT_WIDTH // HEAD_WIDTH,
        "initializer_range": 0.05,
    }


def _text_config(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_MLP_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_WIDTH // HEAD_WIDTH,
        "num_key_value_heads": TEXT_WIDTH // HEAD_WIDTH,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "initializer_range": 0.05,
    }
