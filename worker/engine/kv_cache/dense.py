"""Keys and values of running requests in rows of fixed length, as a transformers `Cache`.

Row r of layer l is `keys[l][r, :, :length]`. Running requests fill rows 0…B−1 without gaps, so a decode step is an
ordinary `[B, 1]` forward over views: nothing is copied when requests join, and one row moves when one leaves.
Works with every attention code path of a model, eager ones included, because only the cache and the mask are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from worker.engine.request import Unsuited

FULL, SLIDING = "full_attention", "sliding_attention"


class DenseCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """KV rows of up to `num_rows` requests of up to `row_length` tokens each. Engine thread only.

    Memory is taken at the first `load`, when the layers' shapes are known. Sliding-window layers keep whole rows
    too; the mask hides what has left the window. Masked entries get weight 0, which hides only finite numbers: what
    is not a row's own is zero.
    """

    is_compileable = False

    def __init__(self, num_rows: int, row_length: int) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.row_length = row_length
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = torch.empty(0, dtype=torch.long)
        self._write_at = torch.empty(0, dtype=torch.long)
        self._kv_length = 0

    def load(self, row: int, prompt: DynamicCache) -> int:
        """Copy the KV of a prefilled prompt (batch 1) into `row`; return how many tokens it holds.

        Raises Unsuited when not every layer attends to the prompt, but some to something else (cross attention).
        """
        lengths = {int(layer.keys.shape[2]) for layer in prompt.layers}
        if len(lengths) > 1:
            raise Unsuited(f"layers that hold {' and '.join(map(str, sorted(lengths)))} entries of one prompt")
        if not self._keys:
            self._allocate(prompt)
        for keys, values, layer in zip(self._keys, self._values, prompt.layers, strict=True):
            num_tokens = layer.keys.shape[2]
            keys[row, :, :num_tokens] = layer.keys[0]
            values[row, :, :num_tokens] = layer.values[0]
        return int(num_tokens)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of row `source` over row `target`."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def wipe(self, row: int, num_tokens: int) -> None:
        """Write zeros over the first `num_tokens` tokens of a row and the next, which a failed step may have left."""
        for tensor in (*self._keys, *self._values):
            tensor[row, :, : num_tokens + 1] = 0

    def begin_step(self, lengths: Tensor, kv_length: int) -> None:
        """Prepare a decode step: row r's new token is written at `lengths[r]`; attention sees `kv_length` entries."""
        self._rows = torch.arange(lengths.shape[0], device=lengths.device)
        self._write_at = lengths
        self._kv_length = kv_length

    def clear(self) -> None:
        """Give all memory back; the next `load` takes it anew."""
        self._keys.clear()
        self._values.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one token per row, `[B, heads, 1, dim]`; return views of the rows, `[B, heads, kv_length, dim]`."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        num_rows = key_states.shape[0]
        rows, write_at = self._rows.to(keys.device), self._write_at.to(keys.device)
        keys[rows, :, write_at] = key_states[:, :, 0]
        values[rows, :, write_at] = value_states[:, :, 0]
        return keys[:num_rows, :, : self._kv_length], values[:num_rows, :, : self._kv_length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries attention sees; models read it only to tell decode from prefill."""
        return self._kv_length

    def _allocate(self, prompt: DynamicCache) -> None:
        """Take rows of zeros, all or none."""

        def rows_like(states: Tensor) -> Tensor:
            _, num_heads, _, head_dim = states.shape
            return states.new_zeros(self.num_rows, num_heads, self.row_length, head_dim)

        keys = [rows_like(layer.keys) for layer in prompt.layers]
        values = [rows_like(layer.values) for layer in prompt.layers]
        self._keys, self._values = keys, values


class DenseMasks:
    """Builds the 4-dimensional masks of a decode step for the layer types of one text model."""

    def __init__(self, text_config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self._window: int | None = getattr(text_config, "sliding_window", None)
        # Eager attention adds the mask to the scores; SDPA takes True for "may look".
        self._additive_dtype = dtype if text_config._attn_implementation == "eager" else None
        layer_types = set(getattr(text_config, "layer_types", None) or ())
        unknown = layer_types - {FULL, SLIDING}
        if unknown:
            raise Unsuited(f"layers of type {', '.join(sorted(unknown))}")
        if layer_types == {FULL}:
            self._window = None
        self._is_mixed = len(layer_types) == 2

    def build(self, lengths: Tensor, kv_length: int) -> Tensor | Mapping[str, Tensor]:
        """Return the mask [B, 1, 1, kv_length] for new tokens at `lengths` [B], or one per layer type."""
        entries = torch.arange(kv_length, device=lengths.device)
        newest = lengths[:, None]
        full = entries <= newest
        if self._window is None:
            return self._shaped(full)
        sliding = full & (entries > newest - self._window)
        if not self._is_mixed:
            return self._shaped(sliding)
        return {FULL: self._shaped(full), SLIDING: self._shaped(sliding)}

    def _shaped(self, may_look: Tensor) -> Tensor:
        may_look = may_look[:, None, None]
        if self._additive_dtype is None:
            return may_look
        lowest = torch.finfo(self._additive_dtype).min
        return torch.zeros_like(may_look, dtype=self._additive_dtype).masked_fill_(~may_look, lowest)
