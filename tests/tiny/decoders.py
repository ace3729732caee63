"""LLaVAs with other text decoders, and families whose answers depend on more than keys and values of their own tokens.

For the proof that a back end gives at boot: some are served, the others must be refused by every back end that would
answer otherwise than their own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.tiny.families import CHATML_IMAGES_FIRST, VISION, Parts, new_model, new_tokenizer

_TEXT: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}  # fmt: skip

#: Decoders that both back ends serve.
SERVED: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {"sliding_window": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 3,
    },
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": 3},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
    "smollm3": {"no_rope_layer_interval": 2},
}  # fmt: skip
#: Decoders that rows alone serve, and why paged blocks do not.
ROWS_ONLY: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "doge": ({"sliding_window": 100}, "masks of the model's own making"),
    "gemma2": ({"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}, "attention with softcap"),
    "gpt_oss": (
        {"head_dim": 16, "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
        "attention with s_aux",
    ),
    "gptj": ({"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}, "0 of 3 layers call the attention function"),
    "phimoe": (
        {"sliding_window": 100, "num_local_experts": 2},
        "a layer whose mask looks 100 tokens back, and says None",
    ),
    "stablelm": ({}, "kv_step"),
}
#: Decoders that nobody serves, and what is said of them.
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "bamba": ({**_MAMBA, "attn_layer_indices": [1]}, "its state between tokens is not keys and values alone"),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
        "layers of type hybrid",
    ),
    "llama4_text": (
        {"head_dim": 16, "attention_chunk_size": 16, "intermediate_size_mlp": 96, "num_local_experts": 2},
        "layers of type chunked_attention",
    ),
    "mamba2": ({"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}, "generate fails on a trial prompt"),
    "phi3": ({"original_max_position_embeddings": 32, "rope_parameters": _LONGROPE}, "differ from generate's"),
}


def llava_with(model_type: str, options: Mapping[str, Any]) -> Callable[[], Parts]:
    """Return a maker of a tiny LLaVA with a text decoder of this type."""

    def make() -> Parts:
        tokenizer = new_tokenizer(
            ["<|im_start|>", "<|im_end|>", "<image>"],
            bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False,
        )  # fmt: skip
        processor = transformers.LlavaProcessor(
            transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="full",
            chat_template=CHATML_IMAGES_FIRST,
        )
        config = transformers.LlavaConfig(
            vision_config=transformers.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 3}, image_size=32),
            text_config=CONFIG_MAPPING[model_type](**{**_TEXT, "vocab_size": len(tokenizer), **options}),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_seq_length=16,
        )
        return Parts(new_model(transformers.LlavaForConditionalGeneration, config), processor, tokenizer.eos_token_id)

    return make


def mllama() -> Parts:
    """Make a Llama-3.2-Vision: its pictures are seen by cross attention, in layers of their own."""
    tokenizer = new_tokenizer(
        ["<|image|>", "<|start|>", "<|eot|>"],
        bos="<|begin|>", eos="<|end|>", pad="<|pad|>", named={"image_token": "<|image|>"},
    )  # fmt: skip
    processor = transformers.MllamaProcessor(
        transformers.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4),
        tokenizer,
        chat_template=(
            "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
        ),
    )
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "patch_size": 8,
            "intermediate_size": 48, "image_size": 32, "max_num_tiles": 4, "vision_output_dim": 64,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={
            **_TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 4, "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    model = new_model(transformers.MllamaForConditionalGeneration, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name.rpartition(".")[2]:
                weight.fill_(1.0)  # zero at first: pictures would change nothing
    return Parts(model, processor, tokenizer.eos_token_id)
