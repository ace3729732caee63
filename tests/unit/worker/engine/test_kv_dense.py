"""Rows and masks of the slot cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from worker.engine.kv_cache.dense import DenseCache, DenseMasks
from worker.engine.request import Unsuited


def prompt(num_tokens: int, fill: float) -> DynamicCache:
    """Return the KV of a prompt: two layers, two heads, four dimensions."""
    cache = DynamicCache()
    for layer in range(2):
        states = torch.full((1, 2, num_tokens, 4), fill + layer)
        cache.update(states, -states, layer)
    return cache


def test_a_decode_step_copies_no_rows() -> None:
    cache = DenseCache(num_rows=3, row_length=16)
    assert cache.load(0, prompt(5, 1.0)) == 5
    cache.load(1, prompt(3, 2.0))
    new = torch.full((2, 2, 1, 4), 9.0)
    cache.begin_step(torch.tensor([5, 3]), kv_length=8)
    keys, values = cache.update(new, -new, 0)
    again, _ = cache.update(new, -new, 0)
    assert keys.shape == values.shape == (2, 2, 8, 4)
    assert keys.data_ptr() == again.data_ptr()
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 1, 1, 9, 0, 0], [2, 2, 2, 9, 0, 0, 0, 0]]
    assert torch.equal(values, -keys)


def test_a_moved_row_is_the_row() -> None:
    cache = DenseCache(num_rows=2, row_length=8)
    cache.load(0, prompt(2, 1.0))
    cache.load(1, prompt(6, 5.0))
    cache.move(source=1, target=0, num_tokens=6)
    cache.begin_step(torch.tensor([6]), kv_length=8)
    new = torch.zeros(1, 2, 1, 4)
    keys, _ = cache.update(new, new, 1)
    assert keys[0, 1, :6, 0].tolist() == [6.0] * 6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_show_what_was_written_and_is_in_the_window(attention: str) -> None:
    config = MistralConfig(sliding_window=3, attn_implementation=attention)
    mask = DenseMasks(config, torch.float32).build(torch.tensor([1, 4]), kv_length=6)
    assert isinstance(mask, torch.Tensor)
    may_look = mask if attention == "sdpa" else mask == 0
    assert may_look[:, 0, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]


def test_layers_that_rows_cannot_serve_are_refused() -> None:
    config = LlamaConfig(attn_implementation="sdpa")
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(Unsuited, match="chunked_attention"):
        DenseMasks(config, torch.float32)
