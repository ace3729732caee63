"""Builds tiny random-weight checkpoints: real classes, real processors, real special tokens, a few thousand weights.

`build(name, directory)` leaves a folder that `AutoModelForImageTextToText` and `AutoProcessor` load. The tokenizer is
a byte-level BPE trained here, so nothing is downloaded. Answers are noise, but the noise depends on every image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

CORPUS = (
    "User: What’s the difference between these two images?",
    "Assistant: In the first picture two cats sleep on a pink blanket, in the second a red car waits.",
    "How many people are there in this picture? There's a pink flower, and a dog next to a blue square.",
    "Describe the video frame by frame, please. The circle moves from left to right.",
)

IDEFICS_TURNS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CHATML_IMAGES_FIRST = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a checkpoint consists of."""

    model: PreTrainedModel
    processor: ProcessorMixin
    eos_token_id: int | list[int]


def build(name: str, directory: Path) -> Path:
    """Save the tiny checkpoint of family `name` into `directory` and return `directory`. Same weights every time."""
    return save(_BUILDERS[name], directory)


def save(make: Callable[[], Parts], directory: Path, seed: int = 0) -> Path:
    """Save what `make` makes, with weights drawn from `seed` on which images have an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = make()
    _make_images_matter(parts.model)
    tokenizer, generation = parts.processor.tokenizer, parts.model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.eos_token_id = parts.eos_token_id
    parts.model.save_pretrained(directory)
    parts.processor.save_pretrained(directory)
    return directory


def picture(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    """Return an RGB image of noise; equal seeds and sizes give equal images."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def picture_png(seed: int, width: int = 48, height: int = 48) -> bytes:
    """Return `picture` as the bytes of a PNG file."""
    file = io.BytesIO()
    picture(seed, width, height).save(file, format="PNG")
    return file.getvalue()


def _make_images_matter(model: PreTrainedModel) -> None:
    """Scale random weights up so that answers vary, and redraw the ones whose initial values would hide the image.

    Gemma3's projector and BLIP-2's query tokens start as zeros: without this, images change no logit. Idefics2's
    perceiver latents start as ones and would outweigh what they read from the image.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_embedding = any(part in name for part in ("embed_tokens", "lm_head", "word_embeddings"))
            if name.endswith("resampler.latents"):
                weight.normal_(0, 0.1, generator=generator)
            elif weight.ndim >= 2 and not weight.any():
                weight.normal_(0, 0.3, generator=generator)
            elif weight.ndim >= 2 and not is_embedding:
                weight.mul_(6.0)
            elif name.endswith("bias"):
                weight.add_(torch.empty_like(weight).normal_(0, 0.02, generator=generator))


def new_tokenizer(
    specials: list[str], *, bos: str, eos: str, pad: str, adds_bos: bool = True, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose special tokens are those of the real family; `named` become attributes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every_special = list(dict.fromkeys([pad, bos, eos, *specials, *(named or {}).values()]))
    trainer = trainers.BpeTrainer(
        vocab_size=360 + len(every_special),
        special_tokens=every_special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=specials,
        **(named or {}),
    )


def new_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    return model_class(config).eval()


def idefics2(*, sliding_window: int | None = None, can_split_images: bool = False, image_seq_len: int = 4) -> Parts:
    """Make an Idefics2 whose images take `image_seq_len` tokens; the real one's take 64."""
    tokenizer = new_tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>"], bos="<s>", eos="</s>", pad="<unk>"
    )
    image_processor = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 24, "longest_edge": 56}, do_image_splitting=can_split_images
    )
    processor = transformers.Idefics2Processor(
        image_processor, tokenizer, image_seq_len=image_seq_len, chat_template=IDEFICS_TURNS
    )
    config = transformers.Idefics2Config(
        vision_config={**VISION, "image_size": 56},
        perceiver_config={
            "hidden_size": 64, "resampler_n_latents": image_seq_len, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        text_config=transformers.MistralConfig(vocab_size=len(tokenizer), sliding_window=sliding_window, **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    end_of_utterance = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model = new_model(transformers.Idefics2ForConditionalGeneration, config)
    return Parts(model, processor, [tokenizer.eos_token_id, end_of_utterance])


def _llava() -> Parts:
    tokenizer = new_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>"],
        bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False,
    )  # fmt: skip
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHATML_IMAGES_FIRST,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 3}, image_size=32),
        text_config=transformers.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return Parts(new_model(transformers.LlavaForConditionalGeneration, config), processor, tokenizer.eos_token_id)


def _idefics3() -> Parts:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = new_tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles],
        bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|finetune_right_pad_id|>",
    )  # fmt: skip
    image_processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS_TURNS)
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 32},
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    end_of_utterance = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model = new_model(transformers.Idefics3ForConditionalGeneration, config)
    return Parts(model, processor, [tokenizer.eos_token_id, end_of_utterance])


def _gemma3() -> Parts:
    tokenizer = new_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        bos="<bos>", eos="<eos>", pad="<pad>",
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    )  # fmt: skip
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(image_processor, tokenizer, chat_template=GEMMA_TURNS, image_seq_length=4)
    config = transformers.Gemma3Config(
        vision_config={**VISION, "image_size": 32},
        text_config={
            **TEXT, "vocab_size": len(tokenizer), "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_id=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_id=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model = new_model(transformers.Gemma3ForConditionalGeneration, config)
    return Parts(model, processor, [tokenizer.eos_token_id, end_of_turn])


def _paligemma() -> Parts:
    tokenizer = new_tokenizer(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=False)
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "image_size": 32, "model_type": "siglip_vision_model", "projection_dim": 64},
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(processor.tokenizer), "head_dim": 16},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    model = new_model(transformers.PaliGemmaForConditionalGeneration, config)
    return Parts(model, processor, tokenizer.eos_token_id)


def _blip2() -> Parts:
    tokenizer = new_tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>")
    image_processor = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    config = transformers.Blip2Config(
        # The library's default initializer_range of 1e-10 here would make every image look alike.
        vision_config={**VISION, "image_size": 32, "initializer_range": 0.02},
        qformer_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "encoder_hidden_size": 32,
        },
        text_config={
            "model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 64, "ffn_dim": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
            "word_embed_proj_dim": 64, "do_layer_norm_before": True,
            "bos_token_id": tokenizer.bos_token_id,
        },
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return Parts(new_model(transformers.Blip2ForConditionalGeneration, config), processor, tokenizer.eos_token_id)


def _git() -> Parts:
    tokenizer = new_tokenizer([], bos="[CLS]", eos="[SEP]", pad="[PAD]")
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = transformers.GitProcessor(image_processor, tokenizer)
    config = transformers.GitConfig(
        vision_config={**VISION, "image_size": 32},
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=256,
    )
    return Parts(new_model(transformers.GitForCausalLM, config), processor, tokenizer.eos_token_id)


_BUILDERS: dict[str, Callable[[], Parts]] = {
    "idefics2": idefics2,
    "idefics2-window": lambda: idefics2(sliding_window=24),
    "idefics2-splitting": lambda: idefics2(can_split_images=True),
    "llava": _llava,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "blip2": _blip2,
    "git": _git,
}

FAMILIES = tuple(_BUILDERS)
#: Families with a chat template that take any number of images.
CHAT_FAMILIES = ("idefics2", "idefics2-window", "idefics2-splitting", "llava", "idefics3", "gemma3")
