"""Keys and values of running requests in blocks of fixed size, handed out as requests grow.

`BlockPool` counts blocks, `BlockTables` knows whose they are, `PagedKV` holds the tensors. Block 0 is the null block:
nobody owns it, padding rows write to it and unused places of a table point at it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NULL_BLOCK = 0


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
    """Blocks of a cache of `num_blocks`, the null block not among them.

    A full block may carry a key that says what it holds. It can then have several owners, and without any it is kept
    until its place is needed, the one that was used longest ago first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # The lowest first: a fresh sequence gets neighbours.
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int] | None:
        """Return that many blocks, or None and take nothing."""
        if count > self.num_free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest run of leading keys that is known, and own them too."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._num_owners[block] += 1
            blocks.append(block)
        return blocks

    def register_hash(self, block: int, key: bytes) -> None:
        """Say what an owned block holds from now on. It must not be written again. The first of its kind counts."""
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """Take one owner's blocks back. Last first: the start of a sequence is of use to more than its end."""
        for block in reversed(blocks):
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._keys:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        return block


class BlockTables:
    """Whose blocks are whose: one row of block numbers per running sequence.

    table: [num_rows, max_blocks] on the CPU; places without a block hold the null block.
    """

    def __init__(self, pool: BlockPool, block_size: int, num_rows: int, max_tokens: int) -> None:
        self._pool = pool
        self.block_size = block_size
        self.table = torch.zeros(num_rows, -(-max_tokens // block_size), dtype=torch.long)
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._blocks: dict[int, list[int]] = {}
        self._unclean: list[int] = []

    @property
    def num_sequences(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks that many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int, keys: Sequence[bytes] = ()) -> tuple[int, int] | None:
        """Return a row with blocks for `num_tokens` tokens and how many of these tokens its blocks hold already.

        `keys` say what the first blocks would hold. Returns None when blocks or rows are short.
        """
        if not self._free_rows:
            return None
        found = self._pool.find(keys)
        fresh = self._pool.allocate(self.num_blocks(num_tokens) - len(found))
        if fresh is None:
            self._pool.free(found)
            return None
        row = self._free_rows.pop()
        self._unclean += fresh[-1:]
        blocks = self._blocks[row] = found + fresh
        self.table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.long)
        return row, len(found) * self.block_size

    def register_hash(self, row: int, keys: Sequence[bytes], num_written: int) -> None:
        """Say what those of a row's first blocks hold that `num_written` tokens fill."""
        for block, key in zip(self._blocks[row][: num_written // self.block_size], keys, strict=False):
            self._pool.register_hash(block, key)

    def append(self, row: int, num_tokens: int) -> bool:
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
        self._unclean += blocks
        return True

    def blocks_to_clear(self) -> list[int]:
        """Return, once, the blocks given out that will be looked at before they are full; see `PagedKV.clear`."""
        unclean, self._unclean = self._unclean, []
        return unclean

    def free(self, row: int) -> None:
        """Give a row and its blocks back."""
        self._pool.free(self._blocks.pop(row))
        self.table[row] = NULL_BLOCK
        self._free_rows.append(row)

    def blocks(self, row: int, num_tokens: int) -> Tensor:
        """Return the blocks [n] of a row's first `num_tokens` tokens."""
        return self.table[row, : self.num_blocks(num_tokens)]

    def slot_mapping(self, row: int, start: int, end: int) -> Tensor:
        """Return where tokens `start` to `end` of a row are written, [end − start], counted in tokens."""
        entries = torch.arange(start, end)
        blocks = self.table[row].index_select(0, entries // self.block_size)
        return blocks * self.block_size + entries % self.block_size


class PagedKV:
    """The tensors: per layer, keys and values [num_blocks · block_size, heads, dim]. All memory is taken at once.

    Masked entries get weight 0, which hides only finite numbers: hence zeros at first, and `clear`.
    """

    def __init__(self, layout: Mapping[int, LayerShape], num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        # Layers of one shape lie in one tensor, [layers, num_blocks, numbers of a block].
        self._stores: list[Tensor] = []
        for shape in set(layout.values()):
            layers = [layer for layer, each in layout.items() if each == shape]
            self._keys |= self._allocated(layers, shape, shape.key_dim)
            self._values |= self._allocated(layers, shape, shape.value_dim)

    def _allocated(self, layers: Sequence[int], shape: LayerShape, dim: int) -> Mapping[int, Tensor]:
        """Take memory for layers of one shape; return each one's tensor."""
        sizes = (len(layers), self.num_blocks * self.block_size, shape.num_heads, dim)
        store = torch.zeros(sizes, dtype=shape.dtype, device=shape.device)
        self._stores.append(store.view(len(layers), self.num_blocks, -1))
        return dict(zip(layers, store.unbind(), strict=True))

    def clear(self, blocks: Sequence[int]) -> None:
        """Write zeros over what earlier owners left in `blocks`, infinities and NaN among it. Waits for no device."""
        for store in self._stores if blocks else ():
            index = torch.tensor(blocks, dtype=torch.long).to(store.device, non_blocking=True)
            store.index_fill_(1, index, 0)

    def write(self, layer: int, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        """Write keys and values [T, heads, dim] of T tokens at `slot_mapping` [T]."""
        slot_mapping = slot_mapping.to(keys.device)  # layers may live on different devices
        self._keys[layer].index_copy_(0, slot_mapping, keys)
        self._values[layer].index_copy_(0, slot_mapping, values)

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of a layer's keys and values, [num_blocks, block_size, heads, dim]."""
        keys, values = self._keys[layer], self._values[layer]
        shape = (self.num_blocks, self.block_size)
        return keys.view(*shape, *keys.shape[1:]), values.view(*shape, *values.shape[1:])
