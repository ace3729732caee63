"""Keys and values of running requests in blocks of fixed size, handed out as requests grow.

`BlockPool` counts blocks, `BlockTables` knows whose they are, `PagedKV` holds the tensors. Block 0 is the trash block:
nobody owns it, padding rows write to it and unused places of a table point at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRASH_BLOCK = 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Bytes of one token."""
        return self.num_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class BlockPool:
    """Free blocks of a cache of `num_blocks`, the trash block not among them."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # The lowest first: a fresh sequence gets neighbours.
        self._free = list(range(num_blocks - 1, TRASH_BLOCK, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Return that many blocks, or None and take nothing."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(blocks))


class BlockTables:
    """Whose blocks are whose: one row of block numbers per open sequence.

    table: [num_rows, max_blocks] on the CPU; places without a block hold the trash block.
    """

    def __init__(self, pool: BlockPool, block_size: int, num_rows: int, max_tokens: int) -> None:
        self._pool = pool
        self.block_size = block_size
        self.table = torch.zeros(num_rows, -(-max_tokens // block_size), dtype=torch.long)
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._blocks: dict[int, list[int]] = {}

    @property
    def num_open(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def open(self, num_tokens: int) -> int | None:
        """Return a row with blocks for `num_tokens` tokens, or None when blocks or rows are short."""
        if not self._free_rows:
            return None
        blocks = self._pool.allocate(self.num_blocks(num_tokens))
        if blocks is None:
            return None
        row = self._free_rows.pop()
        self._blocks[row] = blocks
        self.table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.long)
        return row

    def grow(self, row: int, num_tokens: int) -> bool:
        """Give a row blocks for `num_tokens` tokens in all; False, and nothing changes, when they are short."""
        owned = self._blocks[row]
        num_missing = self.num_blocks(num_tokens) - len(owned)
        if num_missing <= 0:
            return True
        blocks = self._pool.allocate(num_missing)
        if blocks is None:
            return False
        self.table[row, len(owned) : len(owned) + num_missing] = torch.tensor(blocks, dtype=torch.long)
        owned += blocks
        return True

    def close(self, row: int) -> None:
        """Give a row and its blocks back."""
        self._pool.release(self._blocks.pop(row))
        self.table[row] = TRASH_BLOCK
        self._free_rows.append(row)

    def blocks(self, row: int, num_tokens: int) -> Tensor:
        """Return the blocks [n] of a row's first `num_tokens` tokens."""
        return self.table[row, : self.num_blocks(num_tokens)]

    def slots(self, row: int, start: int, end: int) -> Tensor:
        """Return where tokens `start` to `end` of a row are written, [end − start], counted in tokens."""
        entries = torch.arange(start, end)
        blocks = self.table[row].index_select(0, entries // self.block_size)
        return blocks * self.block_size + entries % self.block_size


class PagedKV:
    """The tensors: per layer, keys and values [num_blocks · block_size, heads, dim]. All memory is taken at once.

    Zeros at first: masked entries get weight 0, which only finite garbage survives.
    """

    def __init__(self, layout: Mapping[int, LayerShape], num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        num_slots = num_blocks * block_size
        self._keys = {
            layer: torch.zeros(num_slots, s.num_heads, s.key_dim, dtype=s.dtype, device=s.device)
            for layer, s in layout.items()
        }
        self._values = {
            layer: torch.zeros(num_slots, s.num_heads, s.value_dim, dtype=s.dtype, device=s.device)
            for layer, s in layout.items()
        }

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values [T, heads, dim] of T tokens at `slots` [T]."""
        slots = slots.to(keys.device)  # layers may live on different devices
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of a layer's keys and values, [num_blocks, block_size, heads, dim]."""
        keys, values = self._keys[layer], self._values[layer]
        shape = (self.num_blocks, self.block_size)
        return keys.view(*shape, *keys.shape[1:]), values.view(*shape, *values.shape[1:])
