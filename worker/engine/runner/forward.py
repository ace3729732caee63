"""One forward over the tokens of many requests in one row: what goes in, and the call itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.attention.kernels import SDPA, Kernels
from worker.engine.attention.paged import FLAT, DecodeRows, FlatStep, PrefillSeq
from worker.engine.kv_cache.blocks import PagedKV
from worker.engine.model_hooks import ModelHooks
from worker.engine.tensors import to_device


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One token each of B requests; a padding row has nothing cached and a table of null blocks.

    ids, positions: of the newest tokens, [B]. num_cached: entries cached before them, [B]. block_table: [B, W].
    """

    ids: Tensor
    positions: Tensor
    num_cached: Tensor
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of one prompt. embeds: [n, hidden]; positions: [n] or [axes, n]; slot_mapping: [n].

    blocks, context_len: see `PrefillSeq`.

    is_last: the prompt ends here, so the logits of the last token are wanted.
    """

    embeds: Tensor
    positions: Tensor
    slot_mapping: Tensor
    blocks: Tensor
    context_len: int
    is_last: bool


class FlatForward:
    """Feeds decode rows and prefill chunks to the text model in one forward. Engine thread only.

    num_axes: axes of the model's position ids, 1 until a prompt with more comes by.
    kernels: attention code for the device.
    """

    def __init__(self, hooks: ModelHooks, kv: PagedKV, kernels: Kernels = SDPA) -> None:
        self._hooks = hooks
        self._kv = kv
        self._kernels = kernels
        self.num_axes = 1

    @property
    def has_kernel(self) -> bool:
        """Whether decode steps attend with a kernel, which reads of a table only what a row may see."""
        return self._kernels.decode is not None

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [B, V]. Only tensors go in and nothing waits for the device: fit for a CUDA graph."""
        embeds, positions = self._hooks.embed(inputs.ids), self._spread(inputs.positions)
        return self._run(embeds, positions, self._decode_step(inputs), None)

    def mixed(self, inputs: DecodeInputs | None, chunks: Sequence[PrefillChunk]) -> Tensor:
        """Return logits of the decode rows and of the last token of each prompt that ends, [B + ends, V]."""
        embeds = [chunk.embeds for chunk in chunks]
        positions = [self._spread(chunk.positions) for chunk in chunks]
        slot_mapping = [chunk.slot_mapping for chunk in chunks]
        step = FlatStep(self._kv, slot_mapping[0], kernels=self._kernels)
        num_decode = 0
        if inputs is not None:
            step = self._decode_step(inputs)
            num_decode = inputs.ids.shape[0]
            embeds.insert(0, self._hooks.embed(inputs.ids))
            positions.insert(0, self._spread(inputs.positions))
            slot_mapping.insert(0, step.slot_mapping)
        step.slot_mapping = torch.cat(slot_mapping)
        step.prefill_seqs = [PrefillSeq(chunk.embeds.shape[0], chunk.context_len, chunk.blocks) for chunk in chunks]
        ends = itertools.accumulate((seq.num_tokens for seq in step.prefill_seqs), initial=num_decode - 1)
        next(ends)
        wanted = [*range(num_decode), *(end for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last)]
        last = to_device(torch.tensor(wanted, dtype=torch.long), embeds[0].device)
        return self._run(torch.cat(embeds), torch.cat(positions, dim=-1), step, last)

    def _decode_step(self, inputs: DecodeInputs) -> FlatStep:
        block_size = self._kv.block_size
        blocks = inputs.block_table.gather(1, (inputs.num_cached // block_size)[:, None])[:, 0]
        slot_mapping = blocks * block_size + inputs.num_cached % block_size
        rows = DecodeRows(inputs.block_table, inputs.num_cached + 1)
        if self._kernels.decode is not None:
            rows = DecodeRows(rows.block_table.int(), rows.context_lens.int())
        return FlatStep(self._kv, slot_mapping, rows, kernels=self._kernels)

    def _run(self, embeds: Tensor, positions: Tensor, step: FlatStep, last: Tensor | None) -> Tensor:
        """Return logits of the tokens `last` points at, of all without it."""
        positions = positions[None] if positions.ndim == 1 else positions[:, None]
        with self._hooks.attending(FLAT):
            output = self._hooks.text_forward(
                inputs_embeds=embeds[None],
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if last is None else last,
                kv_step=step,
            )
        logits: Tensor = output.logits[0]
        # Some forwards know no `logits_to_keep` and return those of every token (VideoLLaMA 3).
        return logits if last is None or logits.shape[0] == last.shape[0] else logits[last]

    def _spread(self, positions: Tensor) -> Tensor:
        """Text stands at the same place on every axis."""
        if positions.ndim == 2 or self.num_axes == 1:
            return positions
        return positions.expand(self.num_axes, -1)
