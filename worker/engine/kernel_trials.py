"""Small attention problems with known answers, on which attention code for a device is tried at load.

The answers are SDPA's; blocks lie backwards in memory, so code that ignored the block table would be found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from worker.engine.attention import Call, DecodeRows, FlatStep, Span
from worker.engine.kernels import SDPA, Kernels
from worker.engine.kv_paged import LayerShape, PagedKV

#: How far answers may lie from SDPA's, of numbers around 1.
TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Rows of the decode step and tokens that the longest sees; tokens of the prompts' pieces and of what they end.
_NUM_ROWS: Final = 16
_NUM_ENTRIES: Final = 1024
_PIECES: Final = ((96, 96), (160, 704))
_WINDOW: Final = 80


@dataclass(frozen=True, slots=True)
class Trial:
    """One attention call with an answer that is known. `attend` runs it with the kernels given."""

    attend: Callable[[Kernels], Tensor]
    expected: Tensor
    tolerance: float

    def is_passed(self, kernels: Kernels) -> bool:
        """Whether the kernels give the expected answer. Raises what they raise."""
        error = (self.attend(kernels) - self.expected).abs().max()
        return bool(error <= self.tolerance)


def decode_trials(shape: LayerShape, num_heads: int, block_size: int) -> list[Trial]:
    """Return trials of decode rows of many lengths, without and with a window."""
    width = -(-_NUM_ENTRIES // block_size)
    kv, draw = _filled(shape, _NUM_ROWS * width + 1, block_size)
    table = torch.arange(_NUM_ROWS * width, 0, -1, device=shape.device).view(_NUM_ROWS, width)
    lengths = torch.linspace(1, _NUM_ENTRIES, _NUM_ROWS).long().to(shape.device)
    rows = DecodeRows(table.int(), lengths.int())
    newest = (lengths - 1)[:, None]
    slots = (table.gather(1, newest // block_size) * block_size + newest % block_size)[:, 0]
    return _trials(kv, shape, draw(_NUM_ROWS, num_heads, shape.key_dim), lambda k: FlatStep(kv, slots, rows, kernels=k))


def piece_trials(shape: LayerShape, num_heads: int, block_size: int) -> list[Trial]:
    """Return trials of pieces of two prompts, one from its beginning, one that goes on."""
    widths = [-(-kv_len // block_size) for _, kv_len in _PIECES]
    kv, draw = _filled(shape, sum(widths) + 1, block_size)
    blocks = torch.arange(sum(widths), 0, -1, device=shape.device).split_with_sizes(widths)
    spans = [Span(count, kv_len, each) for (count, kv_len), each in zip(_PIECES, blocks, strict=True)]
    slots = torch.cat([_last_slots(span, block_size) for span in spans])
    query = draw(sum(count for count, _ in _PIECES), num_heads, shape.key_dim)
    return _trials(kv, shape, query, lambda k: FlatStep(kv, slots, spans=spans, kernels=k))


def _trials(kv: PagedKV, shape: LayerShape, query: Tensor, step: Callable[[Kernels], FlatStep]) -> list[Trial]:
    """Let steps attend with and without a window; the newest keys and values are written first, as always."""
    flat = (query.shape[0], shape.num_heads)
    generator = torch.Generator().manual_seed(1)
    key, value = (
        torch.randn(*flat, dim, generator=generator).to(shape.device, shape.dtype).transpose(0, 1)[None]
        for dim in (shape.key_dim, shape.value_dim)
    )

    def attend(kernels: Kernels, window: int | None) -> Tensor:
        call = Call(torch.nn.Identity(), None, None, window)
        return step(kernels).attend(0, query.transpose(0, 1)[None], key, value, call).float()

    return [
        Trial(lambda kernels, w=window: attend(kernels, w), attend(SDPA, window), TOLERANCE[shape.dtype])  # type: ignore[misc]
        for window in (None, _WINDOW)
    ]


def _filled(shape: LayerShape, num_blocks: int, block_size: int) -> tuple[PagedKV, Callable[..., Tensor]]:
    """Return one layer of noise and what draws more of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(shape.device, shape.dtype)

    kv = PagedKV({0: shape}, num_blocks, block_size)
    num_slots = num_blocks * block_size
    slots = torch.arange(num_slots, device=shape.device)
    kv.write(
        0, draw(num_slots, shape.num_heads, shape.key_dim), draw(num_slots, shape.num_heads, shape.value_dim), slots
    )
    return kv, draw


def _last_slots(span: Span, block_size: int) -> Tensor:
    entries = torch.arange(span.kv_len - span.num_tokens, span.kv_len, device=span.blocks.device)
    return span.blocks[entries // block_size] * block_size + entries % block_size
