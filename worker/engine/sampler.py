"""Chooses the next token of every row at once, without Python per row.

A greedy batch is one argmax. A sampled row draws by inverse CDF with one uniform number that is a hash of (seed, step):
what else is in the batch does not matter. The filters are those of transformers' own logits processors, in the same
order: what changes greedy rows too (`logits_processor_list`), temperature, top-k, top-p, min-p. `Chooser` takes the
rows one after the other when memory does not hold all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.engine.logits_processor_list import Processing, ProcessingFactory, num_generated
from worker.engine.request import Request, is_out_of_memory
from worker.engine.tensors import to_device
from worker.models.generation_defaults import NEUTRAL, GenerationDefaults

#: Colder rows are greedy: so does their text come out, and float32 logits would overflow.
MIN_TEMPERATURE = 1e-4
#: Constants of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), as signed.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sampled rows that are filtered the same way; every tensor but `rows` is a column [G, 1].

    num_candidates: how many of the largest logits are looked at, sorted; None looks at all, unsorted.
    """

    rows: Tensor
    num_candidates: int | None
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    seeds: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the rows of a batch ask for, as tensors."""

    requests: list[Request]
    groups: list[_Group]
    processing: Processing | None


class Sampler:
    """Holds the batch's parameters as tensors and rebuilds them only when the batch changes. Engine thread only.

    A call that raises changes nothing.
    """

    def __init__(self, eos_token_ids: Sequence[int], defaults: GenerationDefaults = NEUTRAL) -> None:
        self._processing = ProcessingFactory(eos_token_ids, defaults)
        self._batch: _Batch | None = None
        self._last_requests: Sequence[Request] = ()
        self._last_tokens: Tensor | None = None

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Return the next token [B] of each request; `logits` [B, V] in the same order. Nothing waits for the device.

        A token that is pending for a request is one that the last call returned.
        """
        batch = self._batch
        if batch is None or batch.requests != requests:
            batch = self._built(logits, requests)
        tokens = _choose(logits, batch)
        if batch.processing is not None:
            batch.processing.see(tokens)
        self._batch, self._last_requests, self._last_tokens = batch, batch.requests, tokens
        return tokens

    def sample_alone(self, logits: Tensor, request: Request) -> Tensor:
        """Return the next token [1] of one request of a batch that is too large for memory; `logits` [1, V].

        Call `note` when the whole batch has its tokens.
        """
        return _choose(logits, self._built(logits, [request]))

    def note(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Take the requests' tokens [B] for those of the last call."""
        self._batch, self._last_requests, self._last_tokens = None, requests, tokens

    def _built(self, logits: Tensor, requests: Sequence[Request]) -> _Batch:
        num_tokens, device = logits.shape[-1], logits.device
        groups = [
            _group(requests, rows, num_candidates, device)
            for rows, num_candidates in _partition(requests, num_tokens)
            if rows
        ]
        processing = self._processing.make(requests, num_tokens, device)
        if processing is not None and (pending := self._pending(requests, device)) is not None:
            assert self._last_tokens is not None, "pending tokens are those of the last call"
            processing.see_pending(self._last_tokens, pending)
        return _Batch(list(requests), groups, processing)

    def _pending(self, requests: Sequence[Request], device: torch.device) -> Tensor | None:
        """Return where the last call's tokens lie that have not come to the host, [B]; −1 for rows without any."""
        if not any(request.num_pending for request in requests):
            return None
        places = {request: place for place, request in enumerate(self._last_requests)}
        return to_device(torch.tensor([places[each] if each.num_pending else -1 for each in requests]), device)


def _choose(logits: Tensor, batch: _Batch) -> Tensor:
    if batch.processing is None and not batch.groups:
        return logits.argmax(dim=-1)
    scores = logits.float()
    if batch.processing is not None:
        scores = batch.processing.scores(scores)
    tokens = scores.argmax(dim=-1)
    if batch.groups:
        steps = num_generated(batch.requests, logits.device)
        for group in batch.groups:
            uniforms = uniform(group.seeds, steps[group.rows])
            tokens[group.rows] = _draw(*_filtered(scores[group.rows], group), uniforms)
    return tokens


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """Return one float64 in [0, 1) per (seed, step), both int64: two rounds of splitmix64, top 53 bits."""
    bits = _mix(_mix(seeds) + (steps + 1) * _GOLDEN)
    return _shifted_right(bits, 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shifted_right(state, 30)) * _MIX_1
    state = (state ^ _shifted_right(state, 27)) * _MIX_2
    return state ^ _shifted_right(state, 31)


def _shifted_right(bits: Tensor, count: int) -> Tensor:
    """Shift logically: int64's own shift copies the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _partition(requests: Sequence[Request], num_tokens: int) -> list[tuple[list[int], int | None]]:
    """Split the sampled rows by what they need: no order, the k largest logits, or all logits sorted.

    A row's group depends on its own parameters only: other rows cannot change the order in which it is drawn.
    """
    unordered: list[int] = []
    largest: list[int] = []
    ordered: list[int] = []
    max_top_k = 0
    for row, request in enumerate(requests):
        sampling = request.sampling
        if sampling.temperature < MIN_TEMPERATURE:
            continue
        if 0 < sampling.top_k < num_tokens:
            largest.append(row)
            max_top_k = max(max_top_k, sampling.top_k)
        elif sampling.top_p < 1:
            ordered.append(row)
        else:
            unordered.append(row)
    return [(unordered, None), (largest, max_top_k), (ordered, num_tokens)]


def _group(requests: Sequence[Request], rows: list[int], num_candidates: int | None, device: torch.device) -> _Group:
    params = [requests[row].sampling for row in rows]

    def column(value: Callable[[int], float]) -> Tensor:
        return to_device(torch.tensor([value(i) for i in range(len(params))]), device)[:, None]

    return _Group(
        rows=to_device(torch.tensor(rows), device),
        num_candidates=num_candidates,
        temperature=column(lambda i: params[i].temperature),
        top_k=column(lambda i: params[i].top_k or 2**62),
        top_p=column(lambda i: params[i].top_p),
        log_min_p=column(lambda i: params[i].min_p).log(),
        seeds=to_device(torch.tensor([p.seed for p in params]), device),
    )


def _filtered(scores: Tensor, group: _Group) -> tuple[Tensor, Tensor | None]:
    """Return the logits that may be drawn, others −inf, and their token ids when they are not in vocabulary order."""
    scores = scores / group.temperature
    ids: Tensor | None = None
    if group.num_candidates is not None:
        scores, ids = _largest(scores, group.num_candidates)
        ranks = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(ranks >= group.top_k, -torch.inf)
        probabilities = scores.softmax(dim=-1)
        # Nucleus: a token stays while the more likely ones before it hold less than top_p; the first always does.
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        is_outside = mass_before >= group.top_p
        is_outside[:, 0] = False
        # top_p = 1 means off, whatever rounding makes of the sum.
        scores = scores.masked_fill(is_outside & (group.top_p < 1), -torch.inf)
    lowest = scores.amax(dim=-1, keepdim=True) + group.log_min_p
    return scores.masked_fill(scores < lowest, -torch.inf), ids


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest of float32 `scores` and their ids, in order; of equal ones those of lower id come first.

    topk alone breaks ties by its `count`, which depends on the other rows of the batch.
    """
    if count >= scores.shape[-1]:
        ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
        return ordered, ids
    bits = scores.view(torch.int32)
    # Floats of one sign are in order as integers too; negative ones have to be turned round. In place: it is much.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    last = scores.shape[-1] - 1
    keys = ordered.long().bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=scores.device))
    ids = last - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return scores.gather(-1, ids), ids


def _draw(scores: Tensor, ids: Tensor | None, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverse CDF."""
    cdf = scores.softmax(dim=-1).cumsum(dim=-1)
    total = cdf[:, -1:]
    # Rounding may carry u·total up to total, beyond every token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms[:, None].to(cdf.dtype) * total, below_total)
    chosen = torch.searchsorted(cdf, target, right=True).clamp_(max=scores.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Chosen:
    """`tokens` [B] of `requests`; `failed` are those that memory does not hold even alone."""

    requests: Sequence[Request]
    tokens: Tensor
    failed: Mapping[Request, Exception] = field(default_factory=dict)


class Chooser:
    """A sampler that survives a lack of memory. Engine thread only.

    free_memory: gives back what the device's allocator only keeps.
    """

    def __init__(self, sampler: Sampler, free_memory: Callable[[], None]) -> None:
        self._sampler = sampler
        self._free_memory = free_memory

    def choose(self, logits: Tensor, requests: Sequence[Request]) -> Chosen:
        """Return a token for each request; `logits` [B, V] in the same order. Raises when nobody gets one."""
        try:
            return Chosen(requests, self._sampler.sample(logits, requests))
        except Exception as error:
            if len(requests) == 1 or not is_out_of_memory(error):
                raise
            logger.warning("sampling rows one by one after out of memory", extra={"action": "engine.sample"})
        self._free_memory()
        return self._choose_apart(logits, requests)

    def _choose_apart(self, logits: Tensor, requests: Sequence[Request]) -> Chosen:
        tokens: dict[Request, Tensor] = {}
        failed: dict[Request, Exception] = {}
        for row, request in enumerate(requests):
            try:
                tokens[request] = self._sampler.sample_alone(logits[row : row + 1], request)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[request] = error.with_traceback(None)  # its frames hold tensors
                self._free_memory()
        if not tokens:
            raise failed[requests[0]]
        chosen = Chosen(list(tokens), torch.cat(list(tokens.values())), failed)
        self._sampler.note(chosen.requests, chosen.tokens)
        return chosen
