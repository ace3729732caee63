"""What attention code for a device looks like to the engine, and the code of others in that shape.

Others: flash-attn's kernels, and the variable-length one that torch has built in. No CPU runs them; `choose` tries them
at load before they are used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

from torch import Tensor

logger = logging.getLogger(__name__)


class DecodeAttention(Protocol):
    """Attention of one token per request to keys and values in blocks. Must not wait for the device."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Return [B, heads, dim] for query [B, heads, dim] and keys and values [blocks, block size, kv heads, dim].

        block_table: int32 [B, W]. context_lens: int32 [B], entries each may see, its own included. window: how many of
        them, the newest first; None for all.
        """


class PrefillAttention(Protocol):
    """Attention of prefill chunks, one after another in a row. Must not wait for the device."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cu_seqlens: tuple[Tensor, Tensor],
        max_seqlens: tuple[int, int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Return [T, heads, dim] for query [T, heads, dim] and keys and values [S, kv heads, dim].

        Each chunk is the end of its sequence and sees what is before it. cu_seqlens: where each chunk and each sequence
        begins, and the ends of the last, int32 [n + 1]. max_seqlens: tokens of the longest chunk and sequence.
        """


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attention code for a device; None gathers the blocks and calls SDPA, which runs everywhere."""

    decode: DecodeAttention | None = None
    prefill: PrefillAttention | None = None


#: Runs everywhere.
SDPA: Final = Kernels()


def flash_attn() -> Any | None:
    """Return the package if it is there and fits this torch."""
    if find_spec("flash_attn") is None:
        return None
    try:
        return import_module("flash_attn")
    except (ImportError, OSError) as error:
        logger.warning("flash-attn cannot be imported", extra={"action": "engine.kernels", "error": str(error)})
        return None


def flash_decode(flash: Any) -> DecodeAttention:
    def attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        output: Tensor = flash.flash_attn_with_kvcache(
            query[:, None],
            keys,
            values,
            cache_seqlens=context_lens,
            block_table=block_table,
            softmax_scale=scale,
            causal=True,
            window_size=_window_size(window),
        )
        return output[:, 0]

    return attend


def flash_prefill(flash: Any) -> PrefillAttention:
    def attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cu_seqlens: tuple[Tensor, Tensor],
        max_seqlens: tuple[int, int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        output: Tensor = flash.flash_attn_varlen_func(
            query,
            keys,
            values,
            *cu_seqlens,
            *max_seqlens,
            softmax_scale=scale,
            causal=True,
            window_size=_window_size(window),
        )
        return output

    return attend


def torch_prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    scale: float,
    window: int | None,
) -> Tensor:
    # A module that is new in torch and missing in the oldest version allowed.
    varlen: Any = import_module("torch.nn.attention.varlen")
    gqa = query.shape[1] != keys.shape[1]
    left = -1 if window is None else window - 1
    output: Tensor = varlen.varlen_attn(
        query, keys, values, *cu_seqlens, *max_seqlens, scale=scale, window_size=(left, 0), enable_gqa=gqa
    )
    return output


def _window_size(window: int | None) -> tuple[int, int]:
    """How far a token looks back beside itself, and ahead: flash-attn's way."""
    return (-1, -1) if window is None else (window - 1, 0)
