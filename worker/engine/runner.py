"""Runs the model: prefills a request into a row, decodes one token for every row.

Row numbers are the scheduler's; this back end keeps them in a `SlotCache`. What it offers (`prefill`, `decode`,
`release`, `reset`) is all that the rest of the engine knows of a KV back end.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.kv_slots import SlotCache, SlotMasks
from worker.engine.prefill import Prefill
from worker.engine.request import Request
from worker.errors import PromptTooLong

#: Decode attention looks at a multiple of this many entries, so shapes repeat.
KV_LENGTH_STEP = 32


class SlotRunner:
    """One model and the KV rows of its running requests. Engine thread only, under `torch.inference_mode`."""

    def __init__(self, model: PreTrainedModel, num_rows: int, row_length: int) -> None:
        text_config = model.config.get_text_config(decoder=True)
        if text_config._attn_implementation not in ("sdpa", "eager"):
            # Flash attention takes no 4-dimensional mask; only the text decoder needs one.
            model.set_attn_implementation({"text_config": "sdpa"})
        self._prefill = Prefill(model)
        self._cache = SlotCache(num_rows, row_length)
        self._masks = SlotMasks(text_config, model.dtype)
        pixel_values = inspect.signature(model.forward).parameters.get("pixel_values")
        # A forward that insists on an image (BLIP-2) cannot decode; its text model has the head then.
        needs_image = pixel_values is not None and pixel_values.default is inspect.Parameter.empty
        self._decoder = model.get_decoder() if needs_image else model
        self._device = model.device

    def prefill(self, request: Request, row: int) -> Tensor:
        """Read the prompt into `row`; return the logits [1, V] of the first token.

        Raises PromptTooLong when images turned out to take more entries than the row has, and whatever the model
        raises; the other rows are as they were.
        """
        prefilled = self._prefill.run(request.inputs)
        num_cached = prefilled.cache.get_seq_length()
        num_needed = num_cached + request.max_new_tokens
        if num_needed > self._cache.row_length:
            raise PromptTooLong(
                f"prompt takes {num_cached} entries and max_new_tokens is {request.max_new_tokens}: {num_needed} "
                f"do not fit the engine's rows of {self._cache.row_length} tokens"
            )
        self._cache.load(row, prefilled.cache)
        request.num_prompt_cached = num_cached
        request.first_position = prefilled.first_position
        return prefilled.logits

    def decode(self, requests: Sequence[Request]) -> Tensor:
        """Feed the newest token of each request, in row order; return logits [B, V]."""
        tokens = [request.output_ids[-1] for request in requests]
        positions = [request.next_position for request in requests]
        lengths = [request.num_cached_tokens for request in requests]
        step = torch.tensor([tokens, positions, lengths], device=self._device)
        kv_length = min(-(-(max(lengths) + 1) // KV_LENGTH_STEP) * KV_LENGTH_STEP, self._cache.row_length)
        self._cache.begin_step(step[2], kv_length)
        output = self._decoder(
            input_ids=step[0, :, None],
            position_ids=step[1, :, None],
            attention_mask=self._masks.build(step[2], kv_length),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def release(self, request: Request, last: Request) -> None:
        """Free the row of `request`; `last`, in the last row, takes its place."""
        if last is not request:
            self._cache.move(last.row, request.row, last.num_cached_tokens)

    def reset(self) -> None:
        """Forget every row and give its memory back."""
        self._cache.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
