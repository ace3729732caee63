"""Chooses the next token of every row at once, without Python per row.

A greedy batch is one argmax. A sampled row draws by inverse CDF with one uniform number that is a hash of (seed,
step): what else is in the batch does not matter. The filters are those of transformers' own logits processors, in
the same order: repetition penalty, min_new_tokens, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.request import Request
from worker.engine.transfer import to_device

#: Colder rows are greedy: so does their text come out, and float32 logits would overflow.
MIN_TEMPERATURE = 1e-4
#: Constants of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), as signed.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


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
class _Penalty:
    """Rows with a repetition penalty. `seen` [P, V] marks tokens of prompt and answer and is kept up to date."""

    rows: Tensor
    factor: Tensor
    seen: Tensor

    def see(self, tokens: Tensor) -> None:
        """Mark the newest token of each row of the batch, [B]."""
        self.seen.scatter_(1, tokens.index_select(0, self.rows)[:, None], True)

    def see_pending(self, tokens: Tensor, places: Tensor) -> None:
        """Mark tokens of the last batch; `places` [B] says for each row of this one where its own lies, −1: nowhere."""
        places = places.index_select(0, self.rows)[:, None]
        newest = tokens.index_select(0, places[:, 0].clamp(min=0))[:, None]
        was_seen = self.seen.gather(1, newest)
        self.seen.scatter_(1, newest, was_seen | (places >= 0))


@dataclass(frozen=True, slots=True)
class _MinNewTokens:
    """floors [B]: tokens that each row must have before one of `end_ids` [E] may come."""

    floors: Tensor
    end_ids: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the rows of a batch ask for, as tensors."""

    requests: list[Request]
    groups: list[_Group]
    penalty: _Penalty | None
    min_new_tokens: _MinNewTokens | None


class Sampler:
    """Holds the batch's parameters as tensors and rebuilds them only when the batch changes. Engine thread only.

    A call that raises changes nothing.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = list(eos_token_ids)
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
        if batch.penalty is not None:
            batch.penalty.see(tokens)
        self._batch, self._last_requests, self._last_tokens = batch, batch.requests, tokens
        return tokens

    def sample_alone(self, logits: Tensor, request: Request) -> Tensor:
        """Return the next token [1] of one request of a batch that is too large for memory; `logits` [1, V].

        `note` says when the whole batch has its tokens.
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
        penalty, pending = _penalty(requests, num_tokens, device), self._pending(requests, device)
        if penalty is not None and pending is not None and self._last_tokens is not None:
            penalty.see_pending(self._last_tokens, pending)
        floors = [request.sampling.min_new_tokens for request in requests]
        # As for transformers, tokens that the model cannot choose are no reason to fail.
        end_ids = [token for token in self._eos_token_ids if token < num_tokens]
        return _Batch(list(requests), groups, penalty, _min_new_tokens(floors, end_ids, device))

    def _pending(self, requests: Sequence[Request], device: torch.device) -> Tensor | None:
        """Return where the last call's tokens lie that have not come to the host, [B]; −1 for rows without any."""
        if not any(request.num_pending for request in requests):
            return None
        places = {request: place for place, request in enumerate(self._last_requests)}
        return to_device(torch.tensor([places[each] if each.num_pending else -1 for each in requests]), device)


def _choose(logits: Tensor, batch: _Batch) -> Tensor:
    if batch.penalty is None and batch.min_new_tokens is None and not batch.groups:
        return logits.argmax(dim=-1)
    steps = to_device(torch.tensor([request.num_generated for request in batch.requests]), logits.device)
    scores = _processed(logits.float(), steps, batch)
    tokens = scores.argmax(dim=-1)
    for group in batch.groups:
        uniforms = uniform(group.seeds, steps[group.rows])
        tokens[group.rows] = _draw(*_filtered(scores[group.rows], group), uniforms)
    return tokens


def _processed(scores: Tensor, steps: Tensor, batch: _Batch) -> Tensor:
    """Apply repetition penalty and min_new_tokens, which count for greedy rows too."""
    if batch.penalty is not None:
        rows, factor, seen = batch.penalty.rows, batch.penalty.factor, batch.penalty.seen
        old = scores[rows]
        penalised = torch.where(old < 0, old * factor, old / factor)
        scores = scores.index_copy(0, rows, torch.where(seen, penalised, old))
    if batch.min_new_tokens is not None:
        is_too_early = (steps < batch.min_new_tokens.floors)[:, None]
        ends = scores.index_select(1, batch.min_new_tokens.end_ids)
        scores = scores.index_copy(1, batch.min_new_tokens.end_ids, ends.masked_fill(is_too_early, -torch.inf))
    return scores


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

    A row's group depends on its own parameters only, so company cannot change the order in which it is drawn.
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
        seeds=to_device(torch.tensor([p.seed or 0 for p in params]), device),
    )


def _penalty(requests: Sequence[Request], num_tokens: int, device: torch.device) -> _Penalty | None:
    rows = [row for row, request in enumerate(requests) if request.sampling.repetition_penalty != 1]
    if not rows:
        return None
    factors = [requests[row].sampling.repetition_penalty for row in rows]
    known = [torch.cat((requests[row].prompt_ids, torch.tensor(requests[row].output_ids).long())) for row in rows]
    # Placeholders of images may lie beyond what the model can choose.
    marks = torch.cat([ids[ids < num_tokens] + index * num_tokens for index, ids in enumerate(known)])
    seen = torch.zeros(len(rows), num_tokens, dtype=torch.bool, device=device)
    seen.view(-1).index_fill_(0, to_device(marks, device), True)
    return _Penalty(to_device(torch.tensor(rows), device), to_device(torch.tensor(factors), device)[:, None], seen)


def _min_new_tokens(floors: Sequence[int], end_ids: Sequence[int], device: torch.device) -> _MinNewTokens | None:
    if not (any(floors) and end_ids):
        return None
    return _MinNewTokens(to_device(torch.tensor(floors), device), to_device(torch.tensor(end_ids), device))


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

    topk alone takes equal ones as they fall for its `count`, which company decides.
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
