"""Tiny random-weight checkpoints of the families whose processors need torchvision: images and native video.

`build_with_video(name, directory)` leaves a folder like those of `families.build`. Only importable classes are touched
when a builder runs, so this module itself can be imported without torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers

from tests.tiny.families import IDEFICS_TURNS, TEXT, VISION, Parts, new_model, new_tokenizer, save

SMOLVLM_TURNS = "<|im_start|>" + IDEFICS_TURNS.replace(
    "{% elif part['type'] == 'text' %}", "{% elif part['type'] == 'video' %}<video>{% elif part['type'] == 'text' %}"
)
ONEVISION_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}\n{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TURNS = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: To be copied: configs write into what they are given.
QWEN_TEXT = {
    **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0},
}  # fmt: skip
#: With these weights no family's greedy answers fall into a loop of two or three tokens.
SEED = 4
QWEN_PATCHES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
#: Real settings would turn 32×32 frames into hundreds of tokens.
QWEN_PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}


def build_with_video(name: str, directory: Path) -> Path:
    """Save the tiny checkpoint of family `name` into `directory` and return `directory`. Same weights every time."""
    return save(_BUILDERS[name], directory, SEED)


def _smolvlm() -> Parts:
    """The real tokenizer does not know `<video>` either: it is a word until the processor replaces it."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = new_tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles],
        bos="<|im_start|>", eos="<end_of_utterance>", pad="<|im_end|>", adds_bos=False,
    )  # fmt: skip
    sizes: dict[str, Any] = {"max_image_size": {"longest_edge": 32}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(size={"longest_edge": 64}, do_image_splitting=True, **sizes),
        tokenizer,
        transformers.SmolVLMVideoProcessor(
            size={"longest_edge": 32}, video_sampling={"max_frames": 8, "fps": 1, "video_size": {"longest_edge": 32}},
            **sizes,
        ),
        image_seq_len=4,
        chat_template=SMOLVLM_TURNS,
    )  # fmt: skip
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "image_size": 32},
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return Parts(new_model(transformers.SmolVLMForConditionalGeneration, config), processor, tokenizer.eos_token_id)


def _onevision() -> Parts:
    tokenizer = _chatml_tokenizer(["<image>", "<video>"])
    grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=grids),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TURNS,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 3}, image_size=32),
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=grids,
    )
    return Parts(
        new_model(transformers.LlavaOnevisionForConditionalGeneration, config), processor, tokenizer.eos_token_id
    )


def _qwen2_vl() -> Parts:
    return qwen(
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLProcessor,
        transformers.Qwen2VLVideoProcessor,
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        QWEN_TEXT,
    )


def _qwen2_5_vl() -> Parts:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
        "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return qwen(
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLProcessor,
        transformers.Qwen2VLVideoProcessor,
        vision,
        QWEN_TEXT,
    )


def _qwen3_vl() -> Parts:
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return qwen(
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLProcessor,
        transformers.Qwen3VLVideoProcessor,
        vision,
        {**QWEN_TEXT, "head_dim": 16},
    )


def qwen(
    model_class: Any, config_class: Any, processor_class: Any, video_class: Any, vision: dict[str, Any], text: Any
) -> Parts:
    """Make a family of Qwen's from its classes and what its vision and text configs say beyond the common."""
    tokenizer = _chatml_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    processor = processor_class(
        transformers.Qwen2VLImageProcessor(size=QWEN_PIXELS, **QWEN_PATCHES),
        tokenizer,
        video_class(size={**QWEN_PIXELS, "longest_edge": 8 * 64 * 64}, **QWEN_PATCHES),
        chat_template=QWEN_TURNS,
    )
    config = config_class(
        vision_config={"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        text_config={
            "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, **deepcopy(text),
        },
        **ids,
    )  # fmt: skip
    return Parts(new_model(model_class, config), processor, tokenizer.eos_token_id)


def _chatml_tokenizer(specials: list[str]) -> transformers.PreTrainedTokenizerFast:
    return new_tokenizer(
        ["<|im_start|>", "<|im_end|>", *specials],
        bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False,
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[], Parts]] = {
    "smolvlm": _smolvlm,
    "onevision": _onevision,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
}

#: All of them have a chat template and take any number of images and clips.
VIDEO_FAMILIES = tuple(_BUILDERS)
