"""Changes logits before a token is chosen, all rows of a batch at once: penalties, bans and forced tokens.

Each processor does what transformers' own of that purpose does (`transformers/generation/logits_process.py`), and they
run in the order of its `_get_logits_processor`. A row's scores depend on that row only; nothing waits for the device:
`History` and `Seen` keep the rows' tokens on it, built from what the host knows and then extended by each new token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from worker.engine.request import Request
from worker.engine.tensors import to_device


def known_ids(request: Request) -> Tensor:
    """Return the ids of prompt and answer that the host knows, int64 [T]."""
    return torch.cat((request.prompt_ids, torch.tensor(request.output_ids).long()))


@dataclass(frozen=True, slots=True)
class History:
    """ids [B, C] of prompt and answer from the left; what lies behind a row's length means nothing."""

    ids: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> History:
        """Return the history of `requests`, with room for all that they may still generate."""
        capacity = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        ids = torch.zeros(len(requests), capacity, dtype=torch.long)
        for row, request in enumerate(requests):
            known = known_ids(request)
            ids[row, : len(known)] = known
        return cls(to_device(ids, device))

    def see(self, tokens: Tensor, lengths: Tensor) -> None:
        """Add the newest token of each row; tokens and the lengths before them are [B]."""
        self.ids.scatter_(1, lengths[:, None], tokens[:, None])

    def see_pending(self, tokens: Tensor, places: Tensor, lengths: Tensor) -> None:
        """Add tokens of the last batch; `places` [B] says for each row where its own lies, −1: nowhere.

        `lengths` count them already.
        """
        at = (lengths - 1)[:, None]
        newest = tokens.index_select(0, places.clamp(min=0))[:, None]
        self.ids.scatter_(1, at, torch.where(places[:, None] >= 0, newest, self.ids.gather(1, at)))

    def ends(self, count: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last `count` ids of each row [B, count], and whether the row is that long [B]."""
        places = lengths[:, None] - count + torch.arange(count, device=self.ids.device)
        return self.ids.gather(1, places.clamp(min=0)), lengths >= count


@dataclass(frozen=True, slots=True)
class Seen:
    """marks [R, V]: the tokens that each of some rows of the batch has seen. `rows` [R] says which."""

    rows: Tensor
    marks: Tensor

    @classmethod
    def of(cls, ids: Sequence[Tensor], rows: Sequence[int], num_tokens: int, device: torch.device) -> Seen:
        """Mark `ids`, one tensor per row. Placeholders of images may lie beyond what the model can choose."""
        places = torch.cat([each[each < num_tokens] + index * num_tokens for index, each in enumerate(ids)])
        marks = torch.zeros(len(rows), num_tokens, dtype=torch.bool, device=device)
        marks.view(-1).index_fill_(0, to_device(places, device), True)
        return cls(to_device(torch.tensor(rows), device), marks)

    def see(self, tokens: Tensor) -> None:
        """Mark the newest token of each row of the batch, [B]."""
        self.marks.scatter_(1, tokens.index_select(0, self.rows)[:, None], True)

    def see_pending(self, tokens: Tensor, places: Tensor) -> None:
        """Mark tokens of the last batch; `places` [B] says for each row of this one where its own lies, −1: nowhere."""
        places = places.index_select(0, self.rows)[:, None]
        newest = tokens.index_select(0, places[:, 0].clamp(min=0))[:, None]
        was_seen = self.marks.gather(1, newest)
        self.marks.scatter_(1, newest, was_seen | (places >= 0))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch at one step; tensors are [B] on the logits' device.

    steps: tokens generated so far. prompt_lengths: tokens of the prompt. history: None where no processor reads it.
    """

    requests: Sequence[Request]
    steps: Tensor
    prompt_lengths: Tensor
    history: History | None

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and answer."""
        return self.prompt_lengths + self.steps


class Processor(Protocol):
    """Returns changed scores [B, V], float32; those it is given stay as they are."""

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """factor [R, 1]: what the scores of tokens that a row has seen are divided by, or times when below 0."""

    seen: Seen
    factor: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        old = scores[self.seen.rows]
        penalised = torch.where(old < 0, old * self.factor, old / self.factor)
        return scores.index_copy(0, self.seen.rows, torch.where(self.seen.marks, penalised, old))


@dataclass(frozen=True, slots=True)
class NoRepeatNGram:
    """Bans the token that would make the last tokens one of `size` tokens that have come before.

    in_prompt: only sequences of the prompt count.
    """

    size: int
    in_prompt: bool

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        assert rows.history is not None
        ids, num_tokens = rows.history.ids, scores.shape[-1]
        num_windows = ids.shape[1] - self.size + 1
        if num_windows <= 0:
            return scores
        lengths = rows.lengths
        begin, _ = rows.history.ends(self.size - 1, lengths)
        ends = torch.arange(self.size, ids.shape[1] + 1, device=ids.device)
        is_repeated = ends <= (rows.prompt_lengths if self.in_prompt else lengths)[:, None]
        for place in range(self.size - 1):
            is_repeated &= ids[:, place : place + num_windows] == begin[:, place : place + 1]
        # A column more takes windows that do not match, and ids that the model cannot choose.
        last = torch.where(is_repeated, ids[:, self.size - 1 :].clamp(max=num_tokens), num_tokens)
        is_banned = scores.new_zeros((scores.shape[0], num_tokens + 1), dtype=torch.bool).scatter_(1, last, True)
        return scores.masked_fill(is_banned[:, :num_tokens], -torch.inf)


@dataclass(frozen=True, slots=True)
class SequenceBias:
    """Adds a bias to the last token of a sequence when its others came just before.

    alone [V]: the biases of single tokens. longer: per length P of what comes before, those tokens [S, P], the last
    tokens [S] and the biases [S].
    """

    alone: Tensor
    longer: Sequence[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, biases: Sequence[tuple[tuple[int, ...], float]], num_tokens: int, device: torch.device) -> SequenceBias:
        """Sequences whose last token the model cannot choose are left out."""
        possible = sorted((pair for pair in biases if pair[0][-1] < num_tokens), key=lambda pair: len(pair[0]))
        alone = torch.zeros(num_tokens)
        longer: list[tuple[Tensor, Tensor, Tensor]] = []
        for length, pairs in groupby(possible, key=lambda pair: len(pair[0])):
            ids, values = zip(*pairs, strict=True)
            sequences, added = torch.tensor(ids), torch.tensor(values, dtype=torch.float)
            before, last = sequences[:, :-1].contiguous(), sequences[:, -1].contiguous()
            if length == 1:
                alone[last] = added
            else:
                longer.append((to_device(before, device), to_device(last, device), to_device(added, device)))
        return cls(to_device(alone, device), longer)

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        bias = self.alone.expand_as(scores).clone()
        for before, last, added in self.longer:
            assert rows.history is not None
            ends, is_long = rows.history.ends(before.shape[1], rows.lengths)
            is_match = (ends[:, None] == before).all(dim=-1) & is_long[:, None]
            bias.index_add_(1, last, torch.where(is_match, added, 0.0))
        return scores + bias


@dataclass(frozen=True, slots=True)
class MinNewTokens:
    """floors [B]: tokens that each row must have before one of `end_ids` [E] may come."""

    floors: Tensor
    end_ids: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        is_too_early = (rows.steps < self.floors)[:, None]
        ends = scores.index_select(1, self.end_ids)
        return scores.index_copy(1, self.end_ids, ends.masked_fill(is_too_early, -torch.inf))


@dataclass(frozen=True, slots=True)
class ForcedFirst:
    """Leaves only `allowed` [V] for the token after a prompt of one token."""

    allowed: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        return _forced(scores, rows.lengths == 1, self.allowed)


@dataclass(frozen=True, slots=True)
class ForcedLast:
    """Leaves only `allowed` [V] for the last token that a row may have; `max_new_tokens` is [B]."""

    allowed: Tensor
    max_new_tokens: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        return _forced(scores, rows.steps == self.max_new_tokens - 1, self.allowed)


def _forced(scores: Tensor, is_time: Tensor, allowed: Tensor) -> Tensor:
    only = torch.zeros_like(scores).masked_fill(~allowed, -torch.inf)
    return torch.where(is_time[:, None], only, scores)


class RemoveInvalid:
    """Makes finite numbers of what is none."""

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        return scores.nan_to_num(nan=0.0)


@dataclass(frozen=True, slots=True)
class LengthDecay:
    """Makes `end_ids` [E] likelier with every token after the first `start`, exponentially in `growth`."""

    start: int
    growth: float
    end_ids: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        overdue = [max(request.num_generated - self.start, 0) for request in rows.requests]
        factors = to_device(torch.tensor([_power(self.growth, count) - 1 for count in overdue]), scores.device)
        ends = scores.index_select(1, self.end_ids)
        bonus = (ends.abs() * factors[:, None]).masked_fill(~ends.isfinite(), 0.0)
        return scores.index_copy(1, self.end_ids, ends + bonus)


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return float("inf")


@dataclass(frozen=True, slots=True)
class Suppress:
    """Bans tokens, banned [V]."""

    banned: Tensor

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        return scores.masked_fill(self.banned, -torch.inf)


@dataclass(frozen=True, slots=True)
class SuppressFirst:
    """Bans tokens, banned [V], where the first comes; behind a forced first one, where the second does."""

    banned: Tensor
    has_forced_first: bool

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        first = (rows.prompt_lengths <= 1).long() if self.has_forced_first else torch.zeros_like(rows.steps)
        return scores.masked_fill((rows.steps == first)[:, None] & self.banned, -torch.inf)
