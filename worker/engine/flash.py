"""Attention code of others in the shape the engine calls it: flash-attn's, and the one that torch has built in.

Not run yet: no CPU can. `kernel_choice` tries it at load before it is used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from worker.engine.kernels import DecodeAttention, PieceAttention

logger = logging.getLogger(__name__)


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
        kv_lens: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        output: Tensor = flash.flash_attn_with_kvcache(
            query[:, None],
            keys,
            values,
            cache_seqlens=kv_lens,
            block_table=block_table,
            softmax_scale=scale,
            causal=True,
            window_size=_window_size(window),
        )
        return output[:, 0]

    return attend


def flash_pieces(flash: Any) -> PieceAttention:
    def attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        output: Tensor = flash.flash_attn_varlen_func(
            query,
            keys,
            values,
            *starts,
            *longest,
            softmax_scale=scale,
            causal=True,
            window_size=_window_size(window),
        )
        return output

    return attend


def torch_pieces(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    window: int | None,
) -> Tensor:
    # A module that is new in torch and missing in the oldest version allowed.
    varlen: Any = import_module("torch.nn.attention.varlen")
    gqa = query.shape[1] != keys.shape[1]
    left = -1 if window is None else window - 1
    output: Tensor = varlen.varlen_attn(
        query, keys, values, *starts, *longest, scale=scale, window_size=(left, 0), enable_gqa=gqa
    )
    return output


def _window_size(window: int | None) -> tuple[int, int]:
    """How far a token looks back beside itself, and ahead: flash-attn's way."""
    return (-1, -1) if window is None else (window - 1, 0)
