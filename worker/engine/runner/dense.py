"""Runs the model over rows of fixed length: one whole prompt at a time, then one token for every row.

An ordinary forward of the model over a `DenseCache`, so every family and every attention code path works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from worker.engine.adapters import Adapters
from worker.engine.batch import Chunk, PrefixStats, StepLogits
from worker.engine.kv_cache.dense import FULL, DenseCache, DenseMasks
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request, Unsuited
from worker.engine.runner.prefill import not_read, prefill
from worker.engine.vision.stage import VisionRunner, VisionStage
from worker.errors import PromptTooLong

#: Decode attention looks at a multiple of this many entries, so shapes repeat.
KV_LENGTH_STEP = 32


class DenseRunner(VisionRunner):
    """A `Runner` with a row per request that has been read. Rows 0…B−1 are taken, without gaps."""

    kv_backend = "slots"
    can_resume = False
    can_run_ahead = False

    def __init__(
        self,
        hooks: ModelHooks,
        vision: VisionStage,
        num_rows: int,
        row_length: int,
        why_not_paged: str | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.why_not_paged = why_not_paged
        model = hooks.model
        self._hooks = hooks
        super().__init__(vision, adapters)
        self._choosing = nullcontext if adapters is None else adapters.choosing
        text_config = self._hooks.text_config
        if text_config._attn_implementation not in ("sdpa", "eager"):
            # Flash attention takes no 4-dimensional mask; only the text decoder needs one. SDPA caps no scores.
            caps_scores = getattr(text_config, "attn_logit_softcapping", None) is not None
            can_sdpa = getattr(self._hooks.decoder, "_supports_sdpa", True) and not caps_scores
            model.set_attn_implementation({"text_config": "sdpa" if can_sdpa else "eager"})
        self._cache = DenseCache(num_rows, row_length)
        self._masks = DenseMasks(text_config, model.dtype)
        self._rows: list[Request] = []
        self._device = model.device

    def kv_usage(self) -> float:
        """Return the share of rows that are taken."""
        return len(self._rows) / self._cache.num_rows

    def prefix_stats(self) -> PrefixStats:
        """Every row is read from its beginning."""
        return PrefixStats()

    def can_allocate(self, num_tokens: int, num_running: int) -> bool:
        """There is a row for each request that may run."""
        return True

    def allocate(self, request: Request) -> None:
        """Note the prompt's length as far as it is known before it is read. See `Runner`."""
        self._vision.check(request)
        request.num_prompt_cached = request.inputs.num_prompt_tokens
        request.slot = 0 if self.adapters is None else self.adapters.slot(request.generation.adapter)

    def append(self, request: Request) -> bool:
        """Rows are as long as requests may get."""
        return True

    def run(self, chunks: Sequence[Chunk]) -> StepLogits:
        """Decode all rows, then read the prompts, each into a new row."""
        logits = [self._decode()] if self._rows else []
        failed: list[tuple[Request, Exception]] = []
        for request in [chunk.request for chunk in chunks if chunk.request.row < 0]:
            try:
                logits.append(self._prefill(request))
            except Unsuited:
                raise
            except Exception as error:  # noqa: BLE001 - it fails alone, whatever it is
                failed.append(not_read(request, error))
        return StepLogits(list(self._rows), torch.cat(logits) if logits else None, failed)

    def remember(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Nothing is pending here when a step begins."""

    def free(self, request: Request) -> None:
        """Free the row of a request; the last row takes its place."""
        self._vision.forget(request)
        if request.row < 0:
            return
        last = self._rows.pop()
        self._cache.wipe(request.row, request.num_cached_tokens)
        if last is not request:
            self._cache.move(last.row, request.row, last.num_cached_tokens)
            self._cache.wipe(last.row, last.num_cached_tokens)
            self._rows[request.row] = last
            last.row = request.row
        request.row = -1

    def reset(self) -> None:
        """Give the rows' memory back."""
        self._cache.clear()
        self.free_memory()

    def _prefill(self, request: Request) -> Tensor:
        """Read a prompt into the next row; return the logits [1, V] of the first token.

        Raises PromptTooLong when images turned out to take more entries than the row has, and whatever the model
        raises; the other rows are as they were.
        """
        arguments = self._vision.arguments(request)
        with self._choosing(request.slot):
            prefilled = prefill(self._hooks, arguments)
        self._vision.forget(request)
        num_cached = prefilled.cache.get_seq_length()
        check_room(num_cached, request, self._cache.row_length)
        self._cache.load(len(self._rows), prefilled.cache)
        request.num_prompt_cached = request.num_cached_tokens = num_cached
        request.first_position = prefilled.first_position
        request.row = len(self._rows)
        self._rows.append(request)
        return prefilled.logits

    def _decode(self) -> Tensor:
        """Feed the newest token of each request, in row order; return logits [B, V]."""
        tokens = [request.output_ids[-1] for request in self._rows]
        positions = [request.next_position for request in self._rows]
        lengths = [request.num_cached_tokens for request in self._rows]
        slots = None if self.adapters is None else self.adapters.slots_of(self._rows, self._device)
        step = torch.tensor([tokens, positions, lengths], device=self._device)
        kv_length = min(-(-(max(lengths) + 1) // KV_LENGTH_STEP) * KV_LENGTH_STEP, self._cache.row_length)
        self._cache.begin_step(step[2], kv_length)
        masks = self._masks.build(step[2], kv_length)
        # A model may take one mask only and make those of its layers of it (PaliGemma 2): the decoder gets ours.
        with self._hooks.handing(attention_mask=masks), self._choosing(slots):
            output = self._hooks.text_forward(
                input_ids=step[0, :, None],
                position_ids=step[1, :, None],
                attention_mask=masks[FULL] if isinstance(masks, Mapping) else masks,
                past_key_values=self._cache,
                use_cache=True,
            )
        for request in self._rows:
            request.num_cached_tokens += 1
        logits: Tensor = output.logits[:, -1]
        return logits


def check_room(num_prompt_cached: int, request: Request, max_model_len: int) -> None:
    """Raise PromptTooLong when images turned out to take more entries than there are."""
    num_needed = num_prompt_cached + request.max_new_tokens
    if num_needed > max_model_len:
        raise PromptTooLong(
            f"prompt takes {num_prompt_cached} entries and max_new_tokens is {request.max_new_tokens}: {num_needed} "
            f"do not fit the engine's rows of {max_model_len} tokens"
        )
