"""Our Triton kernel beside SDPA: on a GPU as it is compiled, on a CPU in Triton's interpreter (`make kernels`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name

from worker.engine.attention.choose import decode_trials
from worker.engine.attention.kernels import Kernels
from worker.engine.kv_cache.blocks import LayerShape

CAN_RUN = find_spec("triton") is not None and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ)
if not CAN_RUN:
    pytest.skip("needs Triton, and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

triton_decode = import_module("worker.engine.attention.triton").triton_decode
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 as if its bits were integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    lengths: tuple[int, ...]
    window: int | None = None


SHAPES = [
    Shape(4, 2, 16, 16, 4, (1, 33, 64, 90)),
    Shape(8, 1, 64, 64, 16, (5, 200, 1)),
    Shape(3, 3, 80, 80, 16, (100, 10, 24, 25), window=24),
    Shape(6, 2, 96, 96, 256, (300, 17), window=1),
    Shape(32, 8, 128, 128, 16, (65, 32)),
    Shape(2, 2, 256, 256, 16, (40,)),
    Shape(4, 2, 24, 40, 8, (40, 64)),
]


def expected(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, shape: Shape) -> Tensor:
    """Return what SDPA says, row by row, in float32."""
    rows = []
    for row, length in enumerate(shape.lengths):
        first = 0 if shape.window is None else max(0, length - shape.window)
        seen = [store[table[row]].flatten(0, 1)[first:length].float().transpose(0, 1)[None] for store in (keys, values)]
        rows.append(
            F.scaled_dot_product_attention(query[row, :, None].float()[None], *seen, scale=0.2, enable_gqa=True)
        )
    return torch.cat(rows)[:, :, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_heads}x{shape.key_dim}")
def test_the_kernel_attends_as_sdpa_does(shape: Shape, dtype: torch.dtype) -> None:
    """Everything that no request owns or may see holds NaN."""
    generator = torch.Generator().manual_seed(0)
    width = -(-max(shape.lengths) // shape.block_size) + 2
    num_blocks = len(shape.lengths) * width + 1

    def store(dim: int) -> Tensor:
        return torch.randn(num_blocks, shape.block_size, shape.num_kv_heads, dim, generator=generator)

    query = torch.randn(len(shape.lengths), shape.num_heads, shape.key_dim, generator=generator)
    keys, values = store(shape.key_dim), store(shape.value_dim)
    table = (torch.randperm(num_blocks - 1, generator=generator) + 1)[: len(shape.lengths) * width].view(-1, width)
    for row, length in enumerate(shape.lengths):
        num_used = -(-length // shape.block_size)
        for each in (keys, values):
            each[table[row, num_used - 1], length - (num_used - 1) * shape.block_size :] = torch.nan
            each[table[row, num_used:]] = torch.nan
            each[0] = torch.nan
        table[row, num_used:] = 0
    query, keys, values, table = (
        t.to(DEVICE, dtype if t.is_floating_point() else None) for t in (query, keys, values, table)
    )
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)

    got = triton_decode(query, keys, values, table.int(), lengths, 0.2, shape.window)

    assert got.dtype is dtype
    error = (got.float() - expected(query, keys, values, table, shape)).abs().max()
    assert error < TOLERANCE[dtype]


def test_the_kernel_passes_the_trials_of_load_time() -> None:
    shape = LayerShape(1, 16, 16, torch.float32, DEVICE)
    assert all(trial.is_passed(Kernels(decode=triton_decode)) for trial in decode_trials(shape, 2, block_size=64))
