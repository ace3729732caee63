"""Blocks, their tables, and what attention sees through them."""

from __future__ import annotations

import pytest
import torch

from worker.engine.config import PagedConfig
from worker.engine.kv_cache.blocks import NULL_BLOCK, BlockPool, BlockTables, LayerShape, PagedKV
from worker.engine.runner.build import count_blocks
from worker.errors import CannotStart

SHAPE = LayerShape(num_heads=2, key_dim=3, value_dim=5, dtype=torch.float32, device=torch.device("cpu"))


def test_a_pool_never_gives_the_null_block_away_and_takes_all_or_nothing() -> None:
    pool = BlockPool(5)
    assert pool.allocate(5) is None
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    pool.free(blocks[:2])
    assert pool.num_free == 2


def test_rows_grow_block_by_block_and_give_everything_back() -> None:
    tables = BlockTables(BlockPool(6), block_size=4, num_rows=2, max_tokens=20)
    row, _ = tables.allocate(5) or (-1, 0)
    assert tables.num_free_blocks == 3
    assert tables.append(row, 8)
    assert tables.num_free_blocks == 3
    assert tables.append(row, 9)
    before = tables.table.clone()
    assert not tables.append(row, 21)
    assert torch.equal(tables.table, before)
    other, _ = tables.allocate(8) or (-1, 0)
    assert tables.allocate(1) is None
    tables.free(row)
    tables.free(other)
    assert tables.num_free_blocks == 5
    assert (tables.table == NULL_BLOCK).all()


def test_slots_follow_the_table() -> None:
    tables = BlockTables(BlockPool(9), block_size=4, num_rows=3, max_tokens=12)
    (first, _), (second, _) = tables.allocate(3) or (-1, 0), tables.allocate(4) or (-1, 0)
    tables.append(first, 9)
    blocks = tables.blocks(first, 9).tolist()
    assert tables.slot_mapping(first, 2, 9).tolist() == [blocks[i // 4] * 4 + i % 4 for i in range(2, 9)]
    assert not set(blocks) & set(tables.blocks(second, 4).tolist())


def test_what_is_written_at_slots_is_found_in_blocks() -> None:
    kv = PagedKV({0: SHAPE, 7: SHAPE}, num_blocks=3, block_size=2)
    keys, values = torch.randn(3, 2, 3), torch.randn(3, 2, 5)
    kv.write(7, keys, values, torch.tensor([5, 2, 3]))
    found_keys, found_values = kv.blocks(7)
    assert torch.equal(found_keys[[2, 1, 1], [1, 0, 1]], keys)
    assert torch.equal(found_values[[2, 1, 1], [1, 0, 1]], values)
    assert not kv.blocks(0)[0].any()


def test_a_registered_block_is_found_again_until_its_place_is_needed() -> None:
    tables = BlockTables(BlockPool(5), block_size=4, num_rows=3, max_tokens=16)
    keys = [b"one", b"two", b"three"]
    row, num_held = tables.allocate(12, keys) or (-1, -1)
    assert num_held == 0
    tables.register_hash(row, keys, num_written=9)
    again, num_held = tables.allocate(12, keys) or (-1, -1)
    assert num_held == 8, "the third block was not full"
    assert tables.num_free_blocks == 0
    shared = tables.blocks(row, 8).tolist()
    assert tables.blocks(again, 8).tolist() == shared
    tables.free(row)
    assert tables.num_free_blocks == 1, "shared blocks still have an owner"
    tables.free(again)
    assert tables.num_free_blocks == 4
    other, num_held = tables.allocate(12, [b"one", b"other"]) or (-1, -1)
    assert num_held == 4
    assert tables.blocks(other, 4).tolist() == shared[:1]
    tables.free(other)
    full, num_held = tables.allocate(16) or (-1, -1)
    tables.free(full)
    assert tables.allocate(12, keys) is not None
    assert tables.num_free_blocks == 1, "everything was needed meanwhile, nothing is known any more"


GPU_0, GPU_1 = torch.device("cuda", 0), torch.device("cuda", 1)


def layers(count: int, device: torch.device) -> list[LayerShape]:
    """Return layers whose tokens take 1024 bytes each: keys and values of 4 heads with 64 numbers of 2 bytes."""
    return [LayerShape(4, 64, 64, torch.bfloat16, device)] * count


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [
        ({}, 8 * 64 + 1),  # a CPU takes what may be needed
        ({GPU_0: 10**12}, 8 * 64 + 1),
        ({GPU_0: 100 * 16 * 10 * 1024}, 90),  # nine tenths of room for 100 blocks of 16 tokens in 10 layers
    ],
)
def test_blocks_are_as_many_as_jobs_may_need_and_memory_holds(
    free_bytes: dict[torch.device, int], expected: int
) -> None:
    layout = dict(enumerate(layers(10, GPU_0)))
    assert count_blocks(PagedConfig(16), layout, 8, 1024, free_bytes) == expected
    assert count_blocks(PagedConfig(16, num_blocks=77), layout, 8, 1024, free_bytes) == 77


def test_of_several_gpus_the_fullest_decides() -> None:
    layout = dict(enumerate([*layers(6, GPU_0), *layers(2, GPU_1)]))
    free_bytes = {GPU_0: 6 * 16 * 1024 * 200, GPU_1: 2 * 16 * 1024 * 100}
    assert count_blocks(PagedConfig(16, memory_fraction=0.5), layout, 8, 512, free_bytes) == 50


def test_memory_that_does_not_hold_one_full_request_is_refused() -> None:
    layout = dict(enumerate(layers(10, GPU_0)))
    with pytest.raises(CannotStart, match=r"1024 tokens takes 64 blocks .* room for 63"):
        count_blocks(PagedConfig(16), layout, 8, 1024, {GPU_0: 70 * 16 * 10 * 1024 + 5000})
