"""Paged decode attention as two Triton kernels: one query token per request against keys and values in blocks.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): the entries of a request are split over several programs, each
attends to its share with an online softmax in float32, and a second kernel weighs the shares by their sums. Only the
entries that a request may see are read, so the width of the block table costs nothing and may be fixed in a CUDA
graph. Import it only where Triton is installed.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries that a program reads at a time, and the least rows of a matrix that tensor cores take.
_TILE: Final = 32
_MIN_ROWS: Final = 16
#: Programs per multiprocessor that keep its memory pipes full, and the most shares of one request.
_PROGRAMS_PER_PROCESSOR: Final = 4
_MAX_SPLITS: Final = 32
#: Multiprocessors that are assumed where there are none to count.
_NUM_PROCESSORS: Final = 4
#: log2(e): powers of two are what the hardware has.
_LOG2_E: Final = 1.4426950408889634
#: Wider heads need more registers than there are.
MAX_HEAD_DIM: Final = 256


def triton_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend as `DecodeAttention` says; head dims up to `MAX_HEAD_DIM`, float32 products are exact to float32."""
    num_rows, num_heads, key_dim = query.shape
    block_size, num_kv_heads, value_dim = values.shape[1:]
    num_splits = _num_splits(query.device, num_rows * num_kv_heads, block_table.shape[1] * block_size)
    # Shares of the weighted values and the logarithms (base 2) of the sums of their weights.
    shares = query.new_empty(num_rows, num_heads, num_splits, value_dim, dtype=torch.float32)
    sums = query.new_empty(num_rows, num_heads, num_splits, dtype=torch.float32)
    output = query.new_empty(num_rows, num_heads, value_dim)
    group = num_heads // num_kv_heads
    block_value = triton.next_power_of_2(value_dim)
    _attend[(num_rows, num_kv_heads, num_splits)](
        query, keys, values, block_table, context_lens, shares, sums,
        scale * _LOG2_E,
        query.stride(0), query.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        block_table.stride(0), num_splits,
        window=window or 0, group=group, block_size=block_size, key_dim=key_dim, value_dim=value_dim,
        tile=_TILE,
        num_query_rows=max(_MIN_ROWS, triton.next_power_of_2(group)),
        key_width=max(_MIN_ROWS, triton.next_power_of_2(key_dim)), value_width=max(_MIN_ROWS, block_value),
        num_warps=4,
    )  # fmt: skip
    _combine[(num_rows, num_heads)](
        shares, sums, output, output.stride(0), output.stride(1), num_splits,
        value_dim=value_dim, max_splits=_MAX_SPLITS, value_width=block_value, num_warps=4,
    )  # fmt: skip
    return output


def _num_splits(device: torch.device, num_programs: int, num_entries: int) -> int:
    """Return into how many shares the entries of each request are split, a power of two.

    Depends on shapes alone, so a recorded launch stays right whatever the lengths are.
    """
    num_processors = _NUM_PROCESSORS
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = num_processors * _PROGRAMS_PER_PROCESSOR // num_programs
    most = min(wanted, -(-num_entries // _TILE), _MAX_SPLITS)
    return 1 << (max(most, 1).bit_length() - 1)


# Numbers that change from step to step must not have a kernel compiled for each.
@triton.jit(do_not_specialize=["table_row", "num_splits"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, block_table, context_lens, shares, sums,
    scale,
    query_row, query_head,
    key_block, key_entry, key_head,
    value_block, value_entry, value_head,
    table_row, num_splits,
    window: tl.constexpr, group: tl.constexpr, block_size: tl.constexpr, key_dim: tl.constexpr,
    value_dim: tl.constexpr, tile: tl.constexpr, num_query_rows: tl.constexpr, key_width: tl.constexpr,
    value_width: tl.constexpr,
):  # fmt: skip
    """One request, one head of keys with the query heads that share it, one share of the entries."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + row).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(context_len - window, 0)
    # Whole tiles per share, counted from the first entry that may be seen.
    per_split = tl.cdiv(tl.cdiv(context_len - first, num_splits), tile) * tile
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, context_len)

    rows, key_dims, value_dims = tl.arange(0, num_query_rows), tl.arange(0, key_width), tl.arange(0, value_width)
    heads = kv_head * group + rows
    query_mask = (rows < group)[:, None] & (key_dims < key_dim)[None, :]
    asked = tl.load(
        query + row * query_row + heads[:, None] * query_head + key_dims[None, :], mask=query_mask, other=0.0
    )
    largest = tl.full([num_query_rows], float("-inf"), tl.float32)
    total = tl.zeros([num_query_rows], tl.float32)
    mixed = tl.zeros([num_query_rows, value_width], tl.float32)
    for start in range(begin, end, tile):
        entries = start + tl.arange(0, tile)
        is_seen = entries < end
        # 64 bits: a large cache has more than 2³¹ numbers.
        block = tl.load(block_table + row * table_row + entries // block_size, mask=is_seen, other=0).to(tl.int64)
        place = entries % block_size
        key_at = keys + block * key_block + place * key_entry + kv_head * key_head
        found = tl.load(
            key_at[None, :] + key_dims[:, None], mask=is_seen[None, :] & (key_dims < key_dim)[:, None], other=0.0
        )
        scores = tl.dot(asked, found, input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # Every tile has at least one entry that is seen, so the maximum is finite.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        value_at = values + block * value_block + place * value_entry + kv_head * value_head
        value = tl.load(
            value_at[:, None] + value_dims[None, :],
            mask=is_seen[:, None] & (value_dims < value_dim)[None, :],
            other=0.0,
        )
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest

    is_empty = begin >= end
    safe_total = tl.where(is_empty, 1.0, total)
    at = (row * tl.num_programs(1) * group + heads) * num_splits + split
    tl.store(
        shares + at[:, None] * value_dim + value_dims[None, :],
        mixed / safe_total[:, None],
        mask=(rows < group)[:, None] & (value_dims < value_dim)[None, :],
    )
    tl.store(sums + at, tl.where(is_empty, float("-inf"), largest + tl.log2(safe_total)), mask=rows < group)


@triton.jit(do_not_specialize=["num_splits"])  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    shares, sums, output, output_row, output_head, num_splits,
    value_dim: tl.constexpr, max_splits: tl.constexpr, value_width: tl.constexpr,
):  # fmt: skip
    """One request and query head: the mean of its shares, weighed by the sums of their weights."""
    row, head = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, max_splits), tl.arange(0, value_width)
    at = (row * tl.num_programs(1) + head) * num_splits + splits
    is_split = splits < num_splits
    logs = tl.load(sums + at, mask=is_split, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    mask = is_split[:, None] & (dims < value_dim)[None, :]
    parts = tl.load(shares + at[:, None] * value_dim + dims[None, :], mask=mask, other=0.0)
    mean = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(
        output + row * output_row + head * output_head + dims,
        mean.to(output.dtype.element_ty),
        mask=dims < value_dim,
    )
