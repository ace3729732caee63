"""What attention code for a device looks like to the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor


class DecodeAttention(Protocol):
    """Attention of one token per request to keys and values in blocks. Must not wait for the device."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        kv_lens: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Return [B, heads, dim] for query [B, heads, dim] and keys and values [blocks, block size, kv heads, dim].

        block_table: int32 [B, W]. kv_lens: int32 [B], entries each may see, its own included. window: how many of
        them, the newest first; None for all.
        """


class PieceAttention(Protocol):
    """Attention of pieces of prompts, one after another in a row. Must not wait for the device."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Return [T, heads, dim] for query [T, heads, dim] and keys and values [S, kv heads, dim].

        Each piece is the end of its sequence and sees what is before it. starts: where each piece and each sequence
        begins, and the ends of the last, int32 [n + 1]. longest: tokens of the longest piece and sequence.
        """


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attention code for a device; None gathers the blocks and calls SDPA, which runs everywhere."""

    decode: DecodeAttention | None = None
    pieces: PieceAttention | None = None


#: Runs everywhere.
SDPA: Final = Kernels()
