"""Tiny random-weight checkpoints of further families, for the table of what is proven and tests of their own.

`build_more(name, directory)` leaves a folder like those of `families.build`. The last ones need torchvision, which is
touched when their builders run only.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers

from tests.tiny.families import (
    CHATML_IMAGES_FIRST,
    IDEFICS_TURNS,
    TEXT,
    VISION,
    Parts,
    new_model,
    new_tokenizer,
    save,
)  # fmt: skip
from tests.tiny.torchvision_families import QWEN_PATCHES, QWEN_PIXELS, QWEN_TEXT, qwen

_SQUARE = {"height": 32, "width": 32}
_GRIDS = [[32, 32], [32, 64], [64, 32], [64, 64]]


def build_more(name: str, directory: Path) -> Path:
    """Save the tiny checkpoint of family `name` into `directory` and return `directory`. Same weights every time."""
    return save(_BUILDERS[name], directory)


def _chatml(*specials: str, named: dict[str, str] | None = None) -> transformers.PreTrainedTokenizerFast:
    return new_tokenizer(
        ["<|im_start|>", "<|im_end|>", *specials],
        bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False, named=named,
    )  # fmt: skip


def _parts(model_class: Any, config: Any, processor: Any) -> Parts:
    return Parts(new_model(model_class, config), processor, processor.tokenizer.eos_token_id)


def _clip_images(kind: Any, **options: Any) -> Any:
    return kind(size={"shortest_edge": 32}, crop_size=_SQUARE, **options)


def _llava_next() -> Parts:
    """Pictures are cut by the grid that suits their shape: how many tokens one takes depends on its sides."""
    tokenizer = _chatml("<image>")
    processor = transformers.LlavaNextProcessor(
        _clip_images(transformers.LlavaNextImageProcessorPil, image_grid_pinpoints=_GRIDS),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML_IMAGES_FIRST,
    )
    config = transformers.LlavaNextConfig(
        vision_config={**VISION, "num_hidden_layers": 3, "image_size": 32, "model_type": "clip_vision_model"},
        text_config=transformers.MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_GRIDS,
        image_seq_length=16,
    )
    return _parts(transformers.LlavaNextForConditionalGeneration, config, processor)


def _vipllava() -> Parts:
    """The tower's features are those of several of its layers side by side."""
    tokenizer = _chatml("<image>")
    processor = transformers.LlavaProcessor(
        _clip_images(transformers.CLIPImageProcessorPil),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML_IMAGES_FIRST,
    )
    config = transformers.VipLlavaConfig(
        vision_config={**VISION, "num_hidden_layers": 4, "image_size": 32, "model_type": "clip_vision_model"},
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -3, 1],
        image_seq_length=16,
    )
    return _parts(transformers.VipLlavaForConditionalGeneration, config, processor)


def _pixtral_processor(spatial_merge_size: int) -> Any:
    tokenizer = _chatml("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=spatial_merge_size,
        chat_template=CHATML_IMAGES_FIRST.replace("<image>", "[IMG]"),
    )


def _pixtral_vision() -> dict[str, Any]:
    return {**VISION, "image_size": 64, "model_type": "pixtral"}


def _pixtral() -> Parts:
    """A LLaVA whose tower takes pictures of any shape, told by `image_sizes`."""
    processor = _pixtral_processor(1)
    config = transformers.LlavaConfig(
        vision_config=_pixtral_vision(),
        text_config=transformers.MistralConfig(vocab_size=len(processor.tokenizer), sliding_window=None, **TEXT),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return _parts(transformers.LlavaForConditionalGeneration, config, processor)


def _mistral3() -> Parts:
    processor = _pixtral_processor(2)
    config = transformers.Mistral3Config(
        vision_config=_pixtral_vision(),
        text_config=transformers.MistralConfig(vocab_size=len(processor.tokenizer), sliding_window=None, **TEXT),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return _parts(transformers.Mistral3ForConditionalGeneration, config, processor)


def _aya_vision() -> Parts:
    """Tiles beside an overview; the text decoder mixes windows with layers that know no positions."""
    words = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    tokenizer = _chatml(*words, *(f"TILE_{number}" for number in range(1, 5)), "TILE")
    processor = transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessorPil(size=_SQUARE, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=IDEFICS_TURNS,
    )
    config = transformers.AyaVisionConfig(
        vision_config={**VISION, "image_size": 32, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={
            **TEXT, "model_type": "cohere2", "vocab_size": len(tokenizer), "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )  # fmt: skip
    return _parts(transformers.AyaVisionForConditionalGeneration, config, processor)


def _paligemma2() -> Parts:
    tokenizer = new_tokenizer(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=False)
    images = transformers.SiglipImageProcessorPil(size=_SQUARE)
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "image_size": 32, "model_type": "siglip_vision_model", "projection_dim": 64},
        text_config={
            **TEXT, "model_type": "gemma2", "vocab_size": len(processor.tokenizer), "head_dim": 16,
            "query_pre_attn_scalar": 16, "sliding_window": 12,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )  # fmt: skip
    return _parts(transformers.PaliGemmaForConditionalGeneration, config, processor)


def _internvl() -> Parts:
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _chatml(named=names)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=_SQUARE, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer,
        transformers.InternVLVideoProcessor(size=_SQUARE),
        image_seq_length=4,
        chat_template=_with_video("<IMG_CONTEXT>", "<video>"),
    )
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return _parts(transformers.InternVLForConditionalGeneration, config, processor)


def _glm4v() -> Parts:
    tokens = [f"<|{kind}|>" for kind in ("image", "video")]
    tokens += [f"<|{end}_of_{kind}|>" for end in ("begin", "end") for kind in ("image", "video")]
    tokenizer = _chatml(*tokens)
    images = {**QWEN_PIXELS, "shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64}
    processor = transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=images, **QWEN_PATCHES),
        tokenizer,
        transformers.Glm4vVideoProcessor(size={**images, "longest_edge": 8 * 64 * 64}, **QWEN_PATCHES),
        chat_template=_with_video(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image"), ("video", "video"), ("image_start", "begin_of_image"), ("image_end", "end_of_image"),
            ("video_start", "begin_of_video"), ("video_end", "end_of_video"),
        )
    }  # fmt: skip
    config = transformers.Glm4vConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 8, "image_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={
            **deepcopy(QWEN_TEXT), "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        },
        **ids,
    )  # fmt: skip
    return _parts(transformers.Glm4vForConditionalGeneration, config, processor)


def _deepseek_vl() -> Parts:
    tokenizer = _chatml(named={"image_token": "<image_placeholder>"})
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessorPil(size=_SQUARE, min_size=8),
        tokenizer,
        num_image_tokens=16,
        chat_template=CHATML_IMAGES_FIRST.replace("<image>", "<image_placeholder>"),
    )
    config = transformers.DeepseekVLConfig(
        vision_config={**VISION, "image_size": 32, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    return _parts(transformers.DeepseekVLForConditionalGeneration, config, processor)


def _ovis2() -> Parts:
    """Features are mixtures of an embedding's rows, between marks that have features of their own."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = _chatml("<image>", "<IMG_ATOM>", *marks)
    processor = transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessorPil(size=_SQUARE, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer,
        image_seq_length=4,
        chat_template=CHATML_IMAGES_FIRST,
    )
    config = transformers.Ovis2Config(
        vision_config={
            **VISION, "image_size": 32, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5,
        },
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=64,
    )  # fmt: skip
    return _parts(transformers.Ovis2ForConditionalGeneration, config, processor)


def _llava_next_video() -> Parts:
    tokenizer = _chatml("<image>", "<video>")
    processor = transformers.LlavaNextVideoProcessor(
        _clip_images(transformers.LlavaNextVideoVideoProcessor),
        _clip_images(transformers.LlavaNextImageProcessor, image_grid_pinpoints=_GRIDS),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_with_video("<image>", "<video>"),
    )
    config = transformers.LlavaNextVideoConfig(
        vision_config={**VISION, "num_hidden_layers": 3, "image_size": 32, "model_type": "clip_vision_model"},
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_GRIDS,
    )
    return _parts(transformers.LlavaNextVideoForConditionalGeneration, config, processor)


def _video_llama_3() -> Parts:
    tokenizer = _chatml("<|image_pad|>", "<|video_pad|>")
    sizes = {"patch_size": 8, "temporal_patch_size": 1}
    processor = transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(size=QWEN_PIXELS, merge_size=1, **sizes),
        tokenizer,
        transformers.VideoLlama3VideoProcessor(
            size={**QWEN_PIXELS, "longest_edge": 8 * 64 * 64}, merge_size=2, **sizes
        ),
        chat_template=_with_video("<|image_pad|>", "<|video_pad|>"),
    )
    config = transformers.VideoLlama3Config(
        vision_config=VISION,
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return _parts(transformers.VideoLlama3ForConditionalGeneration, config, processor)


def _qwen3_vl_moe() -> Parts:
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    return qwen(
        transformers.Qwen3VLMoeForConditionalGeneration,
        transformers.Qwen3VLMoeConfig,
        transformers.Qwen3VLProcessor,
        transformers.Qwen3VLVideoProcessor,
        vision,
        {**QWEN_TEXT, "head_dim": 16, **experts},
    )


def qwen3_5() -> Parts:
    """Make a Qwen3.5: most of its layers keep a state of their own between tokens, no keys and values."""
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2,
        "num_position_embeddings": 64,
    }  # fmt: skip
    linear = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }  # fmt: skip
    return qwen(
        transformers.Qwen3_5ForConditionalGeneration,
        transformers.Qwen3_5Config,
        transformers.Qwen3VLProcessor,
        transformers.Qwen3VLVideoProcessor,
        vision,
        {**QWEN_TEXT, "head_dim": 16, **linear},
    )


def _with_video(image: str, video: str) -> str:
    return IDEFICS_TURNS.replace("<image>", image).replace(
        "{% elif part['type'] == 'text' %}",
        f"{{% elif part['type'] == 'video' %}}{video}{{% elif part['type'] == 'text' %}}",
    )


_WITHOUT_TORCHVISION: dict[str, Callable[[], Parts]] = {
    "llava-next": _llava_next,
    "vipllava": _vipllava,
    "aya-vision": _aya_vision,
    "paligemma2": _paligemma2,
    "deepseek-vl": _deepseek_vl,
    "ovis2": _ovis2,
}
_WITH_TORCHVISION: dict[str, Callable[[], Parts]] = {
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "glm4v": _glm4v,
    "llava-next-video": _llava_next_video,
    "video-llama-3": _video_llama_3,
    "qwen3-vl-moe": _qwen3_vl_moe,
}
_BUILDERS = _WITHOUT_TORCHVISION | _WITH_TORCHVISION

MORE_FAMILIES = tuple(_WITHOUT_TORCHVISION)
MORE_VISION_FAMILIES = tuple(_WITH_TORCHVISION)
