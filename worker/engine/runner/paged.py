"""Runs the model over paged keys and values: decodes and prefill chunks of many requests in one forward.

A prompt is first run through the model up to its decoder (`prefill.capture`). Most can then be read in chunks; those
that cannot go through the model's own forward as a whole, beside the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from worker.engine.adapters import Adapters
from worker.engine.attention.kernels import SDPA, Kernels
from worker.engine.attention.paged import FLAT, DecodeRows, FlatStep, PrefillSeq, PromptStep, attending
from worker.engine.batch import Chunk, DecodeForward, DecodeInputs, NoRoom, PrefillChunk, PrefixStats, StepLogits
from worker.engine.kv_cache.blocks import BlockPool, BlockTables, PagedKV
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.runner.dense import check_room
from worker.engine.runner.prefill import PrefixKeys, Prompt, capture, not_read, read_whole, token_inputs
from worker.engine.tensors import to_device
from worker.engine.vision.stage import VisionRunner, VisionStage


class PagedRunner(VisionRunner):
    """A `Runner` with a block table per running request. It can resume requests.

    reads_whole: read every prompt in one chunk through the model's own forward; for tests and comparison.
    reuses_prefixes: do not read again what another prompt that began alike left in full blocks.
    forward, graphs: how steps are run, and recorded decode steps of it; a plain forward and none if not given.
    """

    kv_backend = "paged"
    why_not_paged: str | None = None
    can_resume = True
    can_run_ahead = True

    def __init__(
        self,
        hooks: ModelHooks,
        kv: PagedKV,
        vision: VisionStage,
        num_rows: int,
        max_model_len: int,
        *,
        reads_whole: bool = False,
        reuses_prefixes: bool = True,
        forward: FlatForward | None = None,
        graphs: DecodeForward | None = None,
    ) -> None:
        self._hooks = hooks
        self._kv = kv
        self._forward = forward or FlatForward(hooks, kv)
        super().__init__(vision, self._forward.adapters)
        self._max_model_len = max_model_len
        self._reads_whole = reads_whole
        self._graphs = graphs
        self._tables = BlockTables(BlockPool(kv.num_blocks), kv.block_size, num_rows, max_model_len)
        self._prefixes = PrefixKeys() if reuses_prefixes else None
        self._prompts: dict[Request, Prompt] = {}
        self._keys: dict[Request, list[bytes]] = {}
        self._num_queried_tokens = 0
        self._num_reused_tokens = 0
        self._device = hooks.model.device
        # The newest tokens of the last step, and where each request's lies among them.
        self._newest = torch.zeros(1, dtype=torch.long, device=self._device)
        self._places: dict[Request, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self._tables.num_free_blocks

    def kv_usage(self) -> float:
        """Return the share of blocks that have an owner."""
        return 1.0 - self._tables.num_free_blocks / max(1, self._kv.num_blocks - 1)

    def prefix_stats(self) -> PrefixStats:
        """Return how many prompt tokens did not have to be read; any thread."""
        return PrefixStats(self._num_queried_tokens, self._num_reused_tokens)

    def can_allocate(self, num_tokens: int, num_running: int) -> bool:
        """Whether the blocks suffice, one more for each decode set aside: else it might be sent away at once."""
        return self._tables.num_blocks(num_tokens) + num_running <= self._tables.num_free_blocks

    def allocate(self, request: Request) -> None:
        """Run images and embedding, take blocks for the prompt and what was generated before. See `Runner`."""
        prompt = capture(self._hooks, self._vision.arguments(request))
        check_room(prompt.num_tokens, request, self._max_model_len)
        request.is_chunkable = not (prompt.is_whole or self._reads_whole)
        num_tokens = prompt.num_tokens + len(request.output_ids)
        keys: list[bytes] = []
        if request.is_chunkable and self._prefixes is not None:
            # The last token is always fed: its logits are wanted.
            keys = self._prefixes.keys(prompt, self._kv.block_size, self._vision.scopes.of(request.generation.adapter))
            keys = keys[: (num_tokens - 1) // self._kv.block_size]
        opened = self._tables.allocate(num_tokens, keys)
        if opened is None:
            raise NoRoom
        request.row, request.num_cached_tokens = opened
        self._num_queried_tokens += prompt.num_tokens if keys else 0
        self._num_reused_tokens += request.num_cached_tokens
        request.num_prompt_cached = prompt.num_tokens
        request.first_position = prompt.first_position
        request.slot = 0 if self.adapters is None else self.adapters.slot(request.generation.adapter)
        self._prompts[request] = prompt
        if request.is_chunkable:
            self._vision.forget(request)
        self._keys[request] = keys
        if prompt.positions.ndim == 2:
            self._forward.num_axes = prompt.positions.shape[0]

    def append(self, request: Request) -> bool:
        """Make room for the newest token."""
        return self._tables.append(request.row, request.num_tokens)

    def run(self, chunks: Sequence[Chunk]) -> StepLogits:
        """Feed decodes and prefill chunks in one forward, then prompts that must stay whole, each in its own."""
        self._kv.clear(self._tables.blocks_to_clear())
        decodes = [chunk.request for chunk in chunks if chunk.request.is_decoding]
        prefills = [chunk for chunk in chunks if not chunk.request.is_decoding and not chunk.request.must_stay_whole]
        requests: list[Request] = []
        logits: list[Tensor] = []
        failed: list[tuple[Request, Exception]] = []
        if decodes or prefills:
            logits.append(self._run_flat(decodes, prefills))
            requests += self._count([*(Chunk(request, 1) for request in decodes), *prefills])
        for chunk in chunks:
            if chunk.request.must_stay_whole:
                try:
                    read = self._run_whole(chunk.request)
                except Exception as error:  # noqa: BLE001 - it fails alone, whatever it is
                    failed.append(not_read(chunk.request, error))
                else:
                    done = self._count([chunk])
                    logits += [read] * len(done)
                    requests += done
        return StepLogits(requests, torch.cat(logits) if requests else None, failed)

    def remember(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Keep the newest tokens [B], which are pending, for the next `run`."""
        self._newest = tokens
        self._places = {request: place for place, request in enumerate(requests)}

    def free(self, request: Request) -> None:
        """Give blocks and prompt up."""
        self._forget(request)
        if request.row >= 0:
            self._tables.free(request.row)
            request.row = -1

    def reset(self) -> None:
        """Give temporary memory back; the blocks of other requests are as they were."""
        self.free_memory()

    def _forget(self, request: Request) -> None:
        self._prompts.pop(request, None)
        self._vision.forget(request)
        self._keys.pop(request, None)

    def _count(self, chunks: Sequence[Chunk]) -> list[Request]:
        """Count what was fed; return the requests that get a token for it."""
        for chunk in chunks:
            request = chunk.request
            request.num_cached_tokens += chunk.num_tokens
            if request in self._keys:
                self._tables.register_hash(request.row, self._keys[request], request.num_cached_tokens)
                if request.num_cached_tokens >= request.num_prompt_cached:
                    self._forget(request)
        return [chunk.request for chunk in chunks if chunk.request.num_unread == 0]

    def _run_flat(self, decodes: Sequence[Request], prefills: Sequence[Chunk]) -> Tensor:
        inputs = self._decode_inputs(decodes) if decodes else None
        if inputs is not None and not prefills:
            return (self._graphs or self._forward).decode(inputs)
        return self._forward.mixed(inputs, [self._prefill_chunk(chunk) for chunk in prefills])

    def _run_whole(self, request: Request) -> Tensor:
        slot_mapping = self._tables.slot_mapping(request.row, 0, request.num_prompt_cached)
        step = PromptStep(self._kv, to_device(slot_mapping, self._device))
        arguments = self._vision.arguments(request)
        with self._forward.choosing(request.slot):
            return read_whole(self._hooks, arguments, step)

    def _decode_inputs(self, decodes: Sequence[Request]) -> DecodeInputs:
        """Return what every decode feeds: one tensor of numbers and one of blocks go to the device."""
        num_cached = [request.num_cached_tokens for request in decodes]
        ids = [0 if request.num_pending else request.output_ids[-1] for request in decodes]
        positions = [request.next_position for request in decodes]
        places = [self._places[request] if request.num_pending else -1 for request in decodes]
        rows = torch.tensor([request.row for request in decodes])
        width = self._tables.num_blocks(max(num_cached) + 1)
        table = to_device(self._tables.table[:, :width].index_select(0, rows), self._device)
        newest, position, cached, place = to_device(torch.tensor([ids, positions, num_cached, places]), self._device)
        if any(request.num_pending for request in decodes):
            newest = torch.where(place < 0, newest, self._newest.index_select(0, place.clamp(min=0)))
        slots = None if self.adapters is None else self.adapters.slots_of(decodes, self._device)
        return DecodeInputs(newest, position, cached, table, slots)

    def _prefill_chunk(self, chunk: Chunk) -> PrefillChunk:
        """Return the next tokens of a prompt, and of the answer so far where a preempted request is read again."""
        request, row = chunk.request, chunk.request.row
        start, end = request.num_cached_tokens, request.num_cached_tokens + chunk.num_tokens
        embeds, positions = token_inputs(self._hooks, request, self._prompts.get(request), start, end)
        slot_mapping = to_device(self._tables.slot_mapping(row, start, end), self._device)
        blocks = to_device(self._tables.blocks(row, end), self._device)
        is_last, slot = end == request.num_tokens, request.slot
        return PrefillChunk(embeds, positions, slot_mapping, blocks, end, is_last, slot)


class FlatForward:
    """Feeds decode rows and prefill chunks to the text model in one forward. Engine thread only.

    num_axes: axes of the model's position ids, 1 until a prompt with more comes by.
    kernels: attention code for the device.
    """

    def __init__(
        self, hooks: ModelHooks, kv: PagedKV, kernels: Kernels = SDPA, adapters: Adapters | None = None
    ) -> None:
        self.adapters = adapters
        self.choosing = nullcontext if adapters is None else adapters.choosing
        self._embedding = hooks.model.get_input_embeddings()
        self._text_config = hooks.text_config
        self._text_forward = hooks.text_forward
        self._kv = kv
        self._kernels = kernels
        self.num_axes = 1

    @property
    def has_kernel(self) -> bool:
        """Whether decode steps attend with a kernel, which reads of a table only what a row may see."""
        return self._kernels.decode is not None

    def decode(self, inputs: DecodeInputs) -> Tensor:
        """Return logits [B, V]. Only tensors go in and nothing waits for the device: fit for a CUDA graph."""
        embeds, positions = self._embed(inputs.ids), self._spread(inputs.positions)
        return self._run(embeds, positions, self._decode_step(inputs), None, inputs.slots)

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
            embeds.insert(0, self._embed(inputs.ids))
            positions.insert(0, self._spread(inputs.positions))
            slot_mapping.insert(0, step.slot_mapping)
        step.slot_mapping = torch.cat(slot_mapping)
        step.prefill_seqs = [PrefillSeq(chunk.embeds.shape[0], chunk.context_len, chunk.blocks) for chunk in chunks]
        ends = itertools.accumulate((seq.num_tokens for seq in step.prefill_seqs), initial=num_decode - 1)
        next(ends)
        wanted = [*range(num_decode), *(end for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last)]
        last = to_device(torch.tensor(wanted, dtype=torch.long), embeds[0].device)
        slots = None if self.adapters is None else self.adapters.slots_of_step(inputs, chunks)
        return self._run(torch.cat(embeds), torch.cat(positions, dim=-1), step, last, slots)

    def _decode_step(self, inputs: DecodeInputs) -> FlatStep:
        block_size = self._kv.block_size
        blocks = inputs.block_table.gather(1, (inputs.num_cached // block_size)[:, None])[:, 0]
        slot_mapping = blocks * block_size + inputs.num_cached % block_size
        rows = DecodeRows(inputs.block_table, inputs.num_cached + 1)
        if self._kernels.decode is not None:
            rows = DecodeRows(rows.block_table.int(), rows.context_lens.int())
        return FlatStep(self._kv, slot_mapping, rows, kernels=self._kernels)

    def _run(
        self, embeds: Tensor, positions: Tensor, step: FlatStep, last: Tensor | None, slots: Tensor | None
    ) -> Tensor:
        """Return logits of the tokens `last` points at, of all without it."""
        positions = positions[None] if positions.ndim == 1 else positions[:, None]
        with attending(self._text_config, FLAT), self.choosing(slots):
            output = self._text_forward(
                inputs_embeds=embeds[None],
                position_ids=positions,
                use_cache=False,
                logits_to_keep=0 if last is None else last,
                kv_step=step,
            )
        logits: Tensor = output.logits[0]
        # Some forwards know no `logits_to_keep` and return those of every token (VideoLLaMA 3).
        return logits if last is None or logits.shape[0] == last.shape[0] else logits[last]

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self._embedding(ids[None])[0]
        return embeddings

    def _spread(self, positions: Tensor) -> Tensor:
        """Text stands at the same place on every axis."""
        if positions.ndim == 2 or self.num_axes == 1:
            return positions
        return positions.expand(self.num_axes, -1)
