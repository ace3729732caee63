"""Blocks, their tables, and what attention sees through them."""

from __future__ import annotations

import torch

from worker.engine.kv_paged import TRASH_BLOCK, BlockPool, BlockTables, LayerShape, PagedKV

SHAPE = LayerShape(num_heads=2, key_dim=3, value_dim=5, dtype=torch.float32, device=torch.device("cpu"))


def test_a_pool_never_gives_the_trash_block_away_and_takes_all_or_nothing() -> None:
    pool = BlockPool(5)
    assert pool.allocate(5) is None
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    pool.release(blocks[:2])
    assert pool.num_free == 2


def test_rows_grow_block_by_block_and_give_everything_back() -> None:
    tables = BlockTables(BlockPool(6), block_size=4, num_rows=2, max_tokens=20)
    row, _ = tables.open(5) or (-1, 0)
    assert tables.num_free_blocks == 3
    assert tables.grow(row, 8)
    assert tables.num_free_blocks == 3
    assert tables.grow(row, 9)
    before = tables.table.clone()
    assert not tables.grow(row, 21)
    assert torch.equal(tables.table, before)
    other, _ = tables.open(8) or (-1, 0)
    assert tables.open(1) is None
    tables.close(row)
    tables.close(other)
    assert tables.num_free_blocks == 5
    assert (tables.table == TRASH_BLOCK).all()


def test_slots_follow_the_table() -> None:
    tables = BlockTables(BlockPool(9), block_size=4, num_rows=3, max_tokens=12)
    (first, _), (second, _) = tables.open(3) or (-1, 0), tables.open(4) or (-1, 0)
    tables.grow(first, 9)
    blocks = tables.blocks(first, 9).tolist()
    assert tables.slots(first, 2, 9).tolist() == [blocks[i // 4] * 4 + i % 4 for i in range(2, 9)]
    assert not set(blocks) & set(tables.blocks(second, 4).tolist())


def test_what_is_written_at_slots_is_found_in_blocks() -> None:
    kv = PagedKV({0: SHAPE, 7: SHAPE}, num_blocks=3, block_size=2)
    keys, values = torch.randn(3, 2, 3), torch.randn(3, 2, 5)
    kv.write(7, keys, values, torch.tensor([5, 2, 3]))
    found_keys, found_values = kv.blocks(7)
    assert torch.equal(found_keys[[2, 1, 1], [1, 0, 1]], keys)
    assert torch.equal(found_values[[2, 1, 1], [1, 0, 1]], values)
    assert not kv.blocks(0)[0].any()


def test_a_named_block_is_found_again_until_its_place_is_needed() -> None:
    tables = BlockTables(BlockPool(5), block_size=4, num_rows=3, max_tokens=16)
    keys = [b"one", b"two", b"three"]
    row, num_held = tables.open(12, keys) or (-1, -1)
    assert num_held == 0
    tables.name(row, keys, num_written=9)
    again, num_held = tables.open(12, keys) or (-1, -1)
    assert num_held == 8, "the third block was not full"
    assert tables.num_free_blocks == 0
    shared = tables.blocks(row, 8).tolist()
    assert tables.blocks(again, 8).tolist() == shared
    tables.close(row)
    assert tables.num_free_blocks == 1, "shared blocks still have an owner"
    tables.close(again)
    assert tables.num_free_blocks == 4
    other, num_held = tables.open(12, [b"one", b"other"]) or (-1, -1)
    assert num_held == 4
    assert tables.blocks(other, 4).tolist() == shared[:1]
    tables.close(other)
    full, num_held = tables.open(16) or (-1, -1)
    tables.close(full)
    assert tables.open(12, keys) is not None
    assert tables.num_free_blocks == 1, "everything was needed meanwhile, nothing is known any more"
