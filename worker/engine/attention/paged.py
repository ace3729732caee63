"""Attention over paged keys and values, as a function that transformers' models call in every layer.

It is registered under three names. Under `FLAT` transformers builds no mask: the tokens of many requests lie in one row
[1, T] and the step itself says what each may see. Under `PROMPT` one whole prompt runs through the model's own forward
and the mask is the model's. Under `LAYOUT` each layer gets, for its mask, how far back that mask looks. What a step
knows travels as the keyword argument `kv_step` of the model's forward, which models hand down to their layers; nothing
is global, so engines in one process cannot disturb each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from worker.engine.attention.kernels import SDPA, Kernels, PrefillAttention
from worker.engine.kv_cache.blocks import PagedKV
from worker.engine.tensors import to_device

FLAT: Final = "visionq_flat"
PROMPT: Final = "visionq_prompt"
LAYOUT: Final = "visionq_layout"
#: Keyword arguments by which transformers' layers ask for other scores: capped, with sinks or biases, of some blocks.
_SCORE_CHANGES: Final = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask", "block_indices")


class KVStep(Protocol):
    """What attention must know about the step it runs in."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Store key and value [1, kv heads, T, dim]; return what query [1, heads, T, dim] sees, [1, T, heads, dim]."""


@dataclass(frozen=True, slots=True)
class Call:
    """A layer's other arguments: itself, its mask, the scale of its scores, how far back it may look."""

    module: nn.Module
    mask: Tensor | None
    scaling: float | None
    window: int | None


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    kv_step: KVStep,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `kv_step` says; the signature is transformers' `AttentionInterface`.

    Raises NotImplementedError for a layer that wants its scores changed in a way that is not done here.
    """
    wanted = [name for name in _SCORE_CHANGES if kwargs.get(name) is not None]
    if wanted:
        raise NotImplementedError(f"attention with {', '.join(wanted)}")
    return kv_step.attend(
        module.layer_idx, query, key, value, Call(module, attention_mask, scaling, sliding_window)
    ), None


def prompt_mask(*args: Any, allow_is_bidirectional_skip: bool = False, **kwargs: Any) -> Tensor | None:
    """Build a whole prompt's mask; the signature is transformers' `AttentionMaskInterface`. None means causal.

    transformers also leaves the mask out where every token sees every other, which would look the same.
    """
    mask: Tensor | None = sdpa_mask(*args, allow_is_bidirectional_skip=False, **kwargs)
    return mask


def window_mask(*_args: Any, local_size: int | None = None, device: Any = None, **_kwargs: Any) -> Tensor:
    """Return [1, 1, 1, 1]: the tokens that a mask lets each token look back, 0 for all. Signature as `prompt_mask`."""
    return torch.full((1, 1, 1, 1), local_size or 0, dtype=torch.long, device=device)


AttentionInterface.register(FLAT, paged_attention)
AttentionInterface.register(LAYOUT, paged_attention)
AttentionInterface.register(PROMPT, paged_attention)
AttentionMaskInterface.register(PROMPT, prompt_mask)
AttentionMaskInterface.register(LAYOUT, window_mask)


@contextmanager
def attending(text_config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Let the text model, and it alone, use another attention function for the block.

    The vision tower keeps its own: a function without a mask function would silently drop its masks.
    """
    before = text_config._attn_implementation
    # The public setter walks over all modules, too slow for every step.
    text_config._attn_implementation_internal = name
    try:
        yield
    finally:
        text_config._attn_implementation_internal = before


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Requests that are fed one token each.

    block_table: [B, W]; W blocks hold the longest. context_lens: entries each may see, its own included, [B].
    """

    block_table: Tensor
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class PrefillSeq:
    """A prefill chunk: `num_tokens` rows of the step that end a sequence of `context_len` entries in `blocks` [n]."""

    num_tokens: int
    context_len: int
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences that prefill chunks end, one behind the other. entries [S]: where their tokens are in the cache.

    cu_seqlens, max_seqlens: see `PrefillAttention`.
    """

    entries: Tensor
    cu_seqlens: tuple[Tensor, Tensor]
    max_seqlens: tuple[int, int]

    @classmethod
    def of(cls, prefill_seqs: Sequence[PrefillSeq], block_size: int) -> Sequences:
        """Lay out the sequences; lengths come from the host, so nothing waits."""
        device = prefill_seqs[0].blocks.device
        places = torch.arange(block_size, device=device)
        entries = [(seq.blocks[:, None] * block_size + places).flatten()[: seq.context_len] for seq in prefill_seqs]
        lengths = [[seq.num_tokens for seq in prefill_seqs], [seq.context_len for seq in prefill_seqs]]
        cu_seqlens = torch.tensor([list(itertools.accumulate(each, initial=0)) for each in lengths], dtype=torch.int32)
        chunks, sequences = to_device(cu_seqlens, device)
        return cls(torch.cat(entries), (chunks, sequences), (max(lengths[0]), max(lengths[1])))


@dataclass(slots=True)
class FlatStep:
    """A row [1, T]: decode rows first, then prefill chunks. `slot_mapping` [T] says where each token is written."""

    kv: PagedKV
    slot_mapping: Tensor
    decode: DecodeRows | None = None
    prefill_seqs: Sequence[PrefillSeq] = ()
    kernels: Kernels = SDPA
    _sequences: Sequences | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _scratch: dict[str, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Store keys and values, attend for decodes and prefill chunks. Runs nothing that waits for the device."""
        self.kv.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), self.slot_mapping)
        flat = query[0].transpose(0, 1)
        scale = flat.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        parts: list[Tensor] = []
        start = 0
        if self.decode is not None:
            start = self.decode.context_lens.shape[0]
            parts.append(self._decode(flat[:start], self.decode, layer, scale, call.window))
        if self.prefill_seqs and self.kernels.prefill is not None:
            parts.append(self._read_all(flat[start:], self.kernels.prefill, layer, scale, call.window))
        else:
            for number, seq in enumerate(self.prefill_seqs):
                end = start + seq.num_tokens
                parts.append(self._read(flat[start:end], number, layer, scale, call.window))
                start = end
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _decode(self, query: Tensor, rows: DecodeRows, layer: int, scale: float, window: int | None) -> Tensor:
        """Attend with the kernel; without one gather the blocks of all rows and attend once.

        Heads that share keys lie side by side as query rows then.
        """
        keys, values = self.kv.blocks(layer)
        if self.kernels.decode is not None:
            return self.kernels.decode(query, keys, values, rows.block_table, rows.context_lens, scale, window)
        num_rows, num_entries = rows.block_table.shape[0], rows.block_table.shape[1] * self.kv.block_size
        index = rows.block_table.flatten().to(keys.device)
        keys = self._gathered("keys", keys, index).view(num_rows, num_entries, *keys.shape[2:])
        values = self._gathered("values", values, index).view(num_rows, num_entries, *values.shape[2:])
        num_heads, head_dim = query.shape[1:]
        packed = query.reshape(num_rows, keys.shape[2], -1, head_dim)
        out = F.scaled_dot_product_attention(
            packed,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._decode_mask(rows, num_entries, window).to(query.device),
            scale=scale,
        )
        return out.reshape(num_rows, num_heads, -1)

    def _gathered(self, name: str, blocks: Tensor, index: Tensor) -> Tensor:
        """Return the blocks at `index`, in the memory that the layer before used: fresh pages cost more than copies."""
        shape = (index.shape[0], *blocks.shape[1:])
        scratch = self._scratch.get(name)
        if (
            scratch is None
            or scratch.shape != shape
            or (scratch.dtype, scratch.device) != (blocks.dtype, blocks.device)
        ):
            scratch = self._scratch[name] = blocks.new_empty(shape)
        return torch.index_select(blocks, 0, index, out=scratch)

    def _decode_mask(self, rows: DecodeRows, num_entries: int, window: int | None) -> Tensor:
        mask = self._masks.get((-1, window))
        if mask is None:
            entries = torch.arange(num_entries, device=rows.context_lens.device)
            newest = rows.context_lens[:, None] - 1
            mask = (entries <= newest) if window is None else (entries <= newest) & (entries > newest - window)
            mask = self._masks[-1, window] = mask[:, None, None]
        return mask

    def _read_all(
        self, query: Tensor, attend: PrefillAttention, layer: int, scale: float, window: int | None
    ) -> Tensor:
        """Gather what the chunks [T, heads, dim] may see, one sequence behind the other, and attend once."""
        if self._sequences is None:
            self._sequences = Sequences.of(self.prefill_seqs, self.kv.block_size)
        its = self._sequences
        keys, values = (each.flatten(0, 1).index_select(0, its.entries) for each in self.kv.blocks(layer))
        return attend(query, keys, values, its.cu_seqlens, its.max_seqlens, scale, window)

    def _read(self, query: Tensor, number: int, layer: int, scale: float, window: int | None) -> Tensor:
        """Attend for one prefill chunk, [n, heads, dim]."""
        seq = self.prefill_seqs[number]
        keys, values = self.kv.blocks(layer)
        index = seq.blocks.to(keys.device)
        keys = keys.index_select(0, index).flatten(0, 1)[: seq.context_len]
        values = values.index_select(0, index).flatten(0, 1)[: seq.context_len]
        mask = self._prefill_mask(number, window, query.device)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None and seq.num_tokens > 1,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return out[0].transpose(0, 1)

    def _prefill_mask(self, number: int, window: int | None, device: torch.device) -> Tensor | None:
        """Return the mask [n, context_len] of a chunk, None where plain causality says it all."""
        seq = self.prefill_seqs[number]
        if seq.num_tokens == seq.context_len and (window is None or seq.context_len <= window):
            return None
        mask = self._masks.get((number, window))
        if mask is None:
            entries = torch.arange(seq.context_len, device=device)
            own = entries[-seq.num_tokens :, None]
            mask = (entries <= own) if window is None else (entries <= own) & (entries > own - window)
            self._masks[number, window] = mask
        return mask


@dataclass(frozen=True, slots=True)
class PromptStep:
    """One whole prompt: keys and values are stored at `slot_mapping` [T], attention is transformers' own."""

    kv: PagedKV
    slot_mapping: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Store keys and values, attend with transformers' own SDPA."""
        self.kv.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), self.slot_mapping)
        output, _ = sdpa_attention_forward(call.module, query, key, value, call.mask, scaling=call.scaling)
        result: Tensor = output
        return result
