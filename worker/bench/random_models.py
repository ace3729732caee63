"""Builds architectures of true size with random weights, without a hub: what the engine bench measures speed on.

The tokenizer is the demo checkpoint's, filled up with words to the architecture's vocabulary, so that every token an
untrained model says shows in its text. Such a model knows no end: every answer is as long as its limit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics2Config,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    LlavaConfig,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights

from worker.demo_model import CHECKPOINT
from worker.models.capabilities import probe
from worker.models.loader import LoadedModel

IMAGE_TOKEN: Final = "<image>"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A config and the processor that goes with it; the tokenizer has the config's vocabulary."""

    config: PreTrainedConfig
    processor: Callable[[PreTrainedTokenizerBase], ProcessorMixin]


def build_random(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedModel:
    """Build one of `RANDOM_MODELS` on `device`; equal seeds give equal weights on equal devices."""
    architecture = RANDOM_MODELS[name]()
    return build(architecture, device, dtype, seed)


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedModel:
    """Build an architecture with random weights."""
    config = architecture.config
    text_config = config.get_text_config()
    tokenizer = _tokenizer(text_config.vocab_size)
    tokenizer.model_max_length = text_config.max_position_embeddings
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processor = architecture.processor(tokenizer)
    processor.chat_template = AutoProcessor.from_pretrained(CHECKPOINT).chat_template
    # Filled once, below: the classes' own initialisation takes minutes at billions of weights.
    with no_init_weights(), device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    _fill(model, seed)
    model.tie_weights()
    model.eval()
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    generation.eos_token_id = [text_config.vocab_size]
    return LoadedModel(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        capabilities=probe(processor, config),
        device=device,
        dtype=dtype,
        attention=str(config._attn_implementation),
        max_context=text_config.max_position_embeddings,
    )


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = copy.deepcopy(AutoProcessor.from_pretrained(CHECKPOINT).tokenizer)
    words = [AddedToken(f"~{number:x};", normalized=False) for number in range(len(tokenizer), vocab_size)]
    tokenizer.add_tokens(words)
    return tokenizer


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draw weights under which activations keep their size, so that answers depend on the whole prompt."""
    generator = torch.Generator(model.device).manual_seed(seed)
    norms = {weight for module in model.modules() if _is_norm(module) for weight in module.parameters(recurse=False)}
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, weight in model.named_parameters():
        if weight in norms or name.endswith("bias"):
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        elif weight in embeddings or weight.ndim == 1:
            weight.normal_(generator=generator)
        else:
            weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def idefics2(
    text: MistralConfig, vision: Mapping[str, int], perceiver: Mapping[str, int], *, shortest_edge: int
) -> Architecture:
    image_size, num_latents = vision["image_size"], perceiver["resampler_n_latents"]

    def processor(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
        image_processor = Idefics2ImageProcessorPil(
            size={"shortest_edge": shortest_edge, "longest_edge": image_size}, do_image_splitting=False
        )
        return Idefics2Processor(image_processor, tokenizer, image_seq_len=num_latents)

    config = Idefics2Config(
        vision_config=dict(vision), perceiver_config=dict(perceiver), text_config=text, tie_word_embeddings=False
    )
    return Architecture(config, processor)


def idefics2_8b() -> Architecture:
    """Idefics2-8b: Mistral-7B, SigLIP-so400m at 980 pixels, a perceiver of 64 latents (its published config.json)."""
    text = MistralConfig(
        vocab_size=32003, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096,
    )  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 980, "patch_size": 14,
    }  # fmt: skip
    perceiver = {
        "hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
        "resampler_head_dim": 96, "num_key_value_heads": 4,
    }  # fmt: skip
    return idefics2(text, vision, perceiver, shortest_edge=378)


def idefics2_512x8() -> Architecture:
    """The same family at hidden 512 × 8 layers with Idefics2-8b's proportions: for a CPU."""
    text = MistralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=8192, sliding_window=None,
    )  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
        "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    perceiver = {
        "hidden_size": 512, "resampler_n_latents": 64, "resampler_depth": 2, "resampler_n_heads": 8,
        "resampler_head_dim": 64, "num_key_value_heads": 2,
    }  # fmt: skip
    return idefics2(text, vision, perceiver, shortest_edge=224)


def llava_05b() -> Architecture:
    """A LLaVA of 0.9 billion weights: Qwen2-0.5B and SigLIP-so400m at 384 pixels, sizes as those two are published."""

    def processor(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
        return LlavaProcessor(
            SiglipImageProcessorPil(size={"height": 384, "width": 384}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="full",
            image_token=IMAGE_TOKEN,
        )

    text = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_select_strategy="full", vision_feature_layer=-1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Architecture(config, processor)


RANDOM_MODELS: Final[Mapping[str, Callable[[], Architecture]]] = {
    "idefics2-8b-random": idefics2_8b,
    "idefics2-512x8-random": idefics2_512x8,
    "llava-0.5b-random": llava_05b,
}
