"""The least time a decode step can take: every weight of the text model and every cached key and value read once.

step ≥ (weight bytes + KV bytes) / bandwidth, with the bandwidth that this device reaches when it copies memory
(the roofline of Williams, Waterman, Patterson 2009, memory side).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch
from transformers import PreTrainedModel

from worker.engine.step_times import Step

#: Large enough that no cache holds them.
_COPY_BYTES: Final = {"cuda": 1 << 30, "cpu": 1 << 28}
_NUM_COPIES: Final = 8


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second, read and written, of the fastest of some copies inside the device's memory."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(_NUM_COPIES):
        _wait(device)
        started_at = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - started_at)
    return 2 * source.nbytes / min(times)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one decode step reads: text decoder and head; of embeddings it reads rows."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {weight for weight in model.get_decoder().parameters() if weight is not table.weight}
    if head is not None:
        weights |= set(head.parameters())
    return sum(weight.nbytes for weight in weights)


def entry_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * num_heads * head_dim * model.dtype.itemsize)


def floor_fraction(model: PreTrainedModel, bandwidth: float, steps: Sequence[Step]) -> float:
    """Return floor over measured time of the steps that fed streams only; 0 without any."""
    decode = [step for step in steps if step.num_streams and not step.num_prompt_tokens]
    taken_s = sum(step.total_s for step in decode)
    num_bytes = sum(weight_bytes(model) + step.num_entries * entry_bytes(model) for step in decode)
    return num_bytes / bandwidth / taken_s if taken_s else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
