"""One forward over the tokens of many requests in one row: what goes in, and the call itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.attention.kernels import SDPA, Kernels
from worker.engine.attention.paged import FLAT, DecodeRows, FlatStep, Span
from worker.engine.kv_cache.blocks import PagedKV
from worker.engine.model_hooks import Entrances
from worker.engine.tensors import to_device


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One token each of B requests; a padding row has length 0 and a table of trash blocks.

    ids, positions: of the newest tokens, [B]. lengths: entries cached before them, [B]. block_table: [B, W].
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """A piece of one prompt. embeds: [n, hidden]; positions: [n] or [axes, n]; slots: [n]; see `Span` for the rest.

    is_last: the prompt ends here, so the logits of the last token are wanted.
    """

    embeds: Tensor
    positions: Tensor
    slots: Tensor
    blocks: Tensor
    kv_len: int
    is_last: bool


class FlatForward:
    """Feeds decode rows and pieces of prompts to the text model in one forward. Engine thread only.

    num_axes: axes of the model's position ids, 1 until a prompt with more comes by.
    kernels: attention code for the device. compiles: let `torch.compile` have the forward of decode steps.
    """

    def __init__(self, entrances: Entrances, kv: PagedKV, kernels: Kernels = SDPA, *, compiles: bool = False) -> None:
        self._entrances = entrances
        self._kv = kv
        self._kernels = kernels
        self._decode_forward = _compiled(entrances.text_forward) if compiles else entrances.text_forward
        self.num_axes = 1

    @property
    def has_kernel(self) -> bool:
        """Whether decode steps attend with a kernel, which reads of a table only what a row may see."""
        return self._kernels.decode is not None

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [B, V]. Only tensors go in and nothing waits for the device: fit for a CUDA graph."""
        embeds, positions = self._entrances.embed(inputs.ids), self._spread(inputs.positions)
        return self._run(self._decode_forward, embeds, positions, self._decode_step(inputs), None)

    def mixed(self, inputs: DecodeInputs | None, pieces: Sequence[PromptPiece]) -> Tensor:
        """Return logits of the decode rows and of the last token of each prompt that ends, [B + ends, V]."""
        embeds = [piece.embeds for piece in pieces]
        positions = [self._spread(piece.positions) for piece in pieces]
        slots = [piece.slots for piece in pieces]
        step = FlatStep(self._kv, slots[0], kernels=self._kernels)
        num_decode = 0
        if inputs is not None:
            step = self._decode_step(inputs)
            num_decode = inputs.ids.shape[0]
            embeds.insert(0, self._entrances.embed(inputs.ids))
            positions.insert(0, self._spread(inputs.positions))
            slots.insert(0, step.slots)
        step.slots = torch.cat(slots)
        step.spans = [Span(piece.embeds.shape[0], piece.kv_len, piece.blocks) for piece in pieces]
        ends = itertools.accumulate((span.num_tokens for span in step.spans), initial=num_decode - 1)
        next(ends)
        wanted = [*range(num_decode), *(end for end, piece in zip(ends, pieces, strict=True) if piece.is_last)]
        last = to_device(torch.tensor(wanted, dtype=torch.long), embeds[0].device)
        return self._run(self._entrances.text_forward, torch.cat(embeds), torch.cat(positions, dim=-1), step, last)

    def _decode_step(self, inputs: DecodeInputs) -> FlatStep:
        block_size = self._kv.block_size
        blocks = inputs.block_table.gather(1, (inputs.lengths // block_size)[:, None])[:, 0]
        slots = blocks * block_size + inputs.lengths % block_size
        rows = DecodeRows(inputs.block_table, inputs.lengths + 1)
        if self._kernels.decode is not None:
            rows = DecodeRows(rows.block_table.int(), rows.kv_lens.int())
        return FlatStep(self._kv, slots, rows, kernels=self._kernels)

    def _run(
        self, forward: Callable[..., Any], embeds: Tensor, positions: Tensor, step: FlatStep, last: Tensor | None
    ) -> Tensor:
        """Return logits of the tokens `last` points at, of all without it."""
        positions = positions[None] if positions.ndim == 1 else positions[:, None]
        with self._entrances.attending(FLAT):
            output = forward(
                inputs_embeds=embeds[None],
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if last is None else last,
                kv_step=step,
            )
        logits: Tensor = output.logits[0]
        # Some forwards know no `logits_to_keep` and say something of every token (VideoLLaMA 3).
        return logits if last is None or logits.shape[0] == last.shape[0] else logits[last]

    def _spread(self, positions: Tensor) -> Tensor:
        """Text stands at the same place on every axis."""
        if positions.ndim == 2 or self.num_axes == 1:
            return positions
        return positions.expand(self.num_axes, -1)


def _compiled(forward: nn.Module) -> Callable[..., Any]:
    """Compile for any number of rows at once: a compilation takes minutes."""
    compiled: Callable[..., Any] = torch.compile(forward, dynamic=True)
    return compiled
