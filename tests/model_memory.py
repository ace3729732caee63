"""The table of memory in docs/real-model.md, computed from the shapes of well-known checkpoints; no weights are needed.

`python -m tests.model_memory --write` puts it there. The shapes are those of the checkpoints' published `config.json`.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.structure.pages import DOCS
from worker.settings import Quantization, WorkerSettings

PAGE = DOCS / "real-model.md"
GIBIBYTE = 1024**3
HALF_BYTES = 2
#: As worker.models.quantization counts them; nf4 has scales beside its four bits.
BYTES_PER_WEIGHT = {Quantization.INT8: 1.0, Quantization.NF4: 0.5 + 1 / 64 + 4 / (64 * 256)}
JOB_TOKENS = 4096
GPU_GIBIBYTES = (24, 80)
_TABLE = re.compile(r"(<!-- memory: .*? -->\n).*?(<!-- /memory -->)", re.DOTALL)
_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14,
}  # fmt: skip


def _decoder(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _qwen(decoder: dict[str, Any]) -> dict[str, Any]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": decoder,
        "vision_config": vision | {"out_hidden_size": decoder["hidden_size"]},
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolVLM-Instruct": {
        "model_type": "smolvlm",
        "text_config": _decoder(2048, 8192, 24, 32, 32, 49155, model_type="llama"),
        "vision_config": _SIGLIP | {"image_size": 384},
        "scale_factor": 3,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(_decoder(2048, 11008, 36, 16, 2, 151936) | {"tie_word_embeddings": True}),
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava",
        "text_config": _decoder(4096, 11008, 32, 32, 32, 32064, model_type="llama"),
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(_decoder(3584, 18944, 28, 28, 4, 152064)),
    "HuggingFaceM4/idefics2-8b": {
        "model_type": "idefics2",
        "text_config": _decoder(4096, 14336, 32, 32, 8, 32003, model_type="mistral"),
        "vision_config": _SIGLIP | {"image_size": 980},
        "tie_word_embeddings": False,
    },
    "HuggingFaceM4/Idefics3-8B-Llama3": {
        "model_type": "idefics3",
        "text_config": _decoder(4096, 14336, 32, 32, 8, 128259, model_type="llama"),
        "vision_config": _SIGLIP | {"image_size": 364},
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a checkpoint's weights, by quantisation, and of one token's keys and values in half precision."""

    weights: dict[Quantization, float]
    kv_bytes: int


def memory_of(shape: dict[str, Any]) -> Memory:
    """Build the model without storage and count. Quantised are all linear layers but the output head."""
    options = dict(shape)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    head = model.get_output_embeddings()
    num_all = sum({id(p): p.numel() for p in model.parameters()}.values())
    linear = (m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    num_linear = sum({id(weight): weight.numel() for weight in linear}.values())
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    quantised = {
        kind: num_linear * size + (num_all - num_linear) * HALF_BYTES for kind, size in BYTES_PER_WEIGHT.items()
    }
    return Memory(
        {Quantization.NONE: num_all * HALF_BYTES, **quantised},
        2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * HALF_BYTES,
    )


def table() -> str:
    """Return the table."""
    jobs = " | ".join(f"jobs of {JOB_TOKENS} tokens in {gpu} GiB" for gpu in GPU_GIBIBYTES)
    lines = [
        f"| checkpoint | half precision | `int8` | `nf4` | keys and values of a token | {jobs} |",
        "|---|---|---|---|---|" + "---|" * len(GPU_GIBIBYTES),
    ]
    for name, shape in CHECKPOINTS.items():
        memory = memory_of(shape)
        weights = [memory.weights[kind] / GIBIBYTE for kind in (Quantization.NONE, Quantization.INT8, Quantization.NF4)]
        cells = [
            *(f"{each:.1f} GiB" for each in weights),
            f"{memory.kv_bytes // 1024} KiB",
            *(str(_num_jobs(memory, gpu * GIBIBYTE)) for gpu in GPU_GIBIBYTES),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _num_jobs(memory: Memory, gpu_bytes: int) -> int:
    fraction: float = WorkerSettings.model_fields["kv_memory_fraction"].default
    free = gpu_bytes - memory.weights[Quantization.NONE]
    return max(0, int(fraction * free / (memory.kv_bytes * JOB_TOKENS)))


def with_table(page: str) -> str:
    """Return the page's text with the table as it should be."""
    return _TABLE.sub(lambda match: f"{match[1]}{table()}{match[2]}", page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.model_memory", description="Compute the table of memory.")
    parser.add_argument("--write", action="store_true", help="into docs/real-model.md, instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
    else:
        sys.stdout.write(table())
