"""Prefill: how a prompt, images and all, becomes something the engine can feed to a text model.

Nothing here knows a model family. Where the first generated token stands is read from the position ids that the model
hands to its own text decoder: one behind the prompt's last token, as `generate` counts. The largest position of the
prompt is something else: the time axis of a clip runs ahead of the text after it.

`PrefixKeys` names the blocks of a prompt by what is in them, so that prompts that begin alike share them. A key covers
everything before it, so equal keys mean equal prefixes. It is made of what the text decoder gets, embeddings and
positions: words, and images as the vision tower saw them, so other media are another key. What else decides about keys
and values, the weights, is the scope in which all keys are made.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from worker.engine.attention.paged import PROMPT, PromptStep, attending
from worker.engine.cache_scope import CacheScope
from worker.engine.model_hooks import ModelHooks
from worker.engine.request import Request
from worker.engine.tensors import to_device
from worker.errors import InvalidRequest

logger = logging.getLogger(__name__)

#: What every decoder takes; anything else that is a tensor must reach it with the whole prompt.
_ORDINARY: Final = frozenset({"inputs_embeds", "input_ids", "position_ids", "attention_mask", "cache_position"})

_VIEWS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: Tokens whose fingerprints are made at a time; bounds the memory for their wide integers.
_STRIDE = 512


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that the model has read.

    logits: of the first new token, [1, V].
    cache: the prompt's KV, batch 1.
    first_position: position id of the first new token.
    """

    logits: Tensor
    cache: DynamicCache
    first_position: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the text decoder would get it.

    embeds: [T, hidden]. positions: [T], or [axes, T] with multi-axis rotary positions.
    is_whole: it must go through the model's forward in one chunk, because the decoder gets more than embeddings
        (deepstack features) or the model's mask lets tokens look ahead (bidirectional image spans).
    first_position: position id of the first new token.
    """

    embeds: Tensor
    positions: Tensor
    is_whole: bool
    first_position: int

    @property
    def num_tokens(self) -> int:
        return self.embeds.shape[0]


def prefill(hooks: ModelHooks, arguments: Mapping[str, Any]) -> Prefilled:
    """Read one prompt into a cache of its own. Raises whatever the model raises.

    arguments, here and below: of the model's forward, on its device.
    """
    cache = DynamicCache()
    with hooks.watching() as seen:
        output = hooks.model(**arguments, past_key_values=cache, use_cache=True, **hooks.last_logits_only)
    positions = seen.get("position_ids")
    # Models that hand no positions down count the tokens of the text, as `generate` does for them.
    first_position = arguments["input_ids"].shape[1] if positions is None else position_after(_of_one_prompt(positions))
    return Prefilled(output.logits[:, -1], cache, first_position)


def capture(hooks: ModelHooks, arguments: Mapping[str, Any]) -> Prompt:
    """Run the model up to its decoder and return what the decoder would get. Raises whatever the model raises."""
    # The model makes its masks before its decoder, so they must be real ones.
    with attending(hooks.text_config, PROMPT):
        seen = hooks.run_to_decoder(arguments)
    embeds: Tensor = seen["inputs_embeds"][0]
    positions = _positions(seen.get("position_ids"), embeds)
    return Prompt(
        embeds=embeds,
        positions=positions,
        is_whole=_has_more_than_embeddings(seen) or _looks_ahead(seen.get("attention_mask"), hooks),
        first_position=position_after(positions),
    )


def token_inputs(
    hooks: ModelHooks, request: Request, prompt: Prompt | None, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Return embeddings [n, hidden] and positions [n] or [axes, n] of tokens `start` to `end` of prompt and answer.

    prompt: None when none of them is the prompt's.
    """
    num_prompt = request.num_prompt_cached
    embeds: list[Tensor] = []
    positions: list[Tensor] = []
    if prompt is not None and start < num_prompt:
        embeds.append(prompt.embeds[start:end])
        positions.append(prompt.positions[..., start:end])
    first, last = max(start - num_prompt, 0), end - num_prompt
    if last > first:
        device = hooks.model.device
        embeds.append(hooks.embed(to_device(torch.tensor(request.output_ids[first:last]), device)))
        places = torch.arange(request.first_position + first, request.first_position + last, device=device)
        positions.append(places.expand(*positions[0].shape[:-1], -1) if positions else places)
    return torch.cat(embeds), torch.cat(positions, dim=-1)


def read_whole(hooks: ModelHooks, arguments: Mapping[str, Any], step: PromptStep) -> Tensor:
    """Run a whole prompt through the model's forward, storing keys and values; return logits [1, V]."""
    with attending(hooks.text_config, PROMPT):
        output = hooks.model(**arguments, use_cache=False, kv_step=step, **hooks.last_logits_only)
    logits: Tensor = output.logits[:, -1]
    return logits


def not_read(request: Request, error: Exception) -> tuple[Request, Exception]:
    """Log that a prompt cannot be read; return both, the error without its frames, which hold the prompt's tensors."""
    facts = {"action": "engine.prefill", "job_id": request.job_id}
    logger.warning("prefill failed", extra=facts, exc_info=error)
    return request, error.with_traceback(None)


def position_after(positions: Tensor) -> int:
    """Return the position id of the token behind `positions`, [T] or [axes, T].

    Raises InvalidRequest when the axes of the last token differ: it belongs to a picture, and the engine gives each
    generated token one position for all axes.
    """
    last = positions[..., -1].flatten().tolist()
    if len(set(last)) > 1:
        raise InvalidRequest("messages: the prompt ends inside a picture or clip; put text behind it")
    return int(last[0]) + 1


def _positions(given: Tensor | None, embeds: Tensor) -> Tensor:
    return torch.arange(embeds.shape[0], device=embeds.device) if given is None else _of_one_prompt(given)


def _of_one_prompt(given: Tensor) -> Tensor:
    """Return positions [T] or [axes, T] of what a decoder is handed for a batch of one prompt."""
    if given.ndim == 1:
        return given
    if given.ndim == 2:
        return given[0]
    # Four axes are three rotary ones behind the plain count that masks are made of.
    return given[-3:, 0]


def _has_more_than_embeddings(seen: Mapping[str, Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and len(value) > 0)
        for name, value in seen.items()
        if name not in _ORDINARY
    )


def _looks_ahead(mask: object, hooks: ModelHooks) -> bool:
    """Whether any token sees a later one; without a mask, or with a 2-dimensional one, the attention itself decides."""
    if isinstance(mask, Mapping):
        return any(_looks_ahead(each, hooks) for each in mask.values())
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return not hooks.is_causal
    may_look = mask if mask.dtype == torch.bool else mask == 0
    return bool(may_look.triu(diagonal=1).any())


class PrefixKeys:
    """Makes keys for one engine. Engine thread only.

    An embedding is a vector of thousands of numbers; two random linear sums of its bits, modulo 2⁶⁴, stand for it
    (Carter, Wegman: Universal classes of hash functions, 1979). They are made on the device, only they are copied. The
    weights are drawn anew by every process, so nobody can prepare two images with the same sums.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(torch.seed())
        self._weights: Tensor | None = None

    def keys(self, prompt: Prompt, block_size: int, scope: CacheScope) -> list[bytes]:
        """Return one key per full block of the prompt, for keys and values that are computed in a scope."""
        prints = self._fingerprints(prompt.embeds)
        positions = prompt.positions.reshape(-1, prompt.num_tokens).T
        # One copy to the host for everything.
        rows = torch.cat((prints, positions.to(prints)), dim=1).cpu().contiguous().numpy()
        keys: list[bytes] = []
        key = scope.key
        for start in range(0, prompt.num_tokens - block_size + 1, block_size):
            key = hashlib.blake2b(key + rows[start : start + block_size].tobytes(), digest_size=16).digest()
            keys.append(key)
        return keys

    def _fingerprints(self, embeds: Tensor) -> Tensor:
        """Return two numbers per token, [T, 2]."""
        bits = embeds.contiguous().view(_VIEWS[embeds.dtype])
        if self._weights is None:
            drawn = torch.randint(-(2**63), 2**63 - 1, (2, bits.shape[1]), generator=self._generator)
            self._weights = drawn.to(bits.device)
        weights = self._weights
        strides = [bits[start : start + _STRIDE] for start in range(0, bits.shape[0], _STRIDE)]
        parts = [torch.stack([(stride.long() * w).sum(-1) for w in weights], dim=1) for stride in strides]
        return torch.cat(parts)
