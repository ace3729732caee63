"""Which processors a batch needs, in transformers' order, and what they remember of its rows.

`ProcessingFactory` knows the checkpoint's defaults and keeps their tables; `Processing` is one batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.logits_processors import (
    ForcedFirst,
    ForcedLast,
    History,
    LengthDecay,
    MinNewTokens,
    NoRepeatNGram,
    Processor,
    RemoveInvalid,
    RepetitionPenalty,
    Rows,
    Seen,
    SequenceBias,
    Suppress,
    SuppressFirst,
    known_ids,
)
from worker.engine.request import Request
from worker.engine.tensors import to_device
from worker.models.generation_defaults import GenerationDefaults


@dataclass(frozen=True, slots=True)
class Processing:
    """The processors of one batch. `see` every chosen token.

    seen: what penalties remember of the rows, prompt and answer.
    """

    requests: Sequence[Request]
    processors: Sequence[Processor]
    prompt_lengths: Tensor
    history: History | None
    seen: Sequence[Seen]

    def scores(self, scores: Tensor) -> Tensor:
        """Return changed `scores` [B, V], float32."""
        rows = Rows(self.requests, num_generated(self.requests, scores.device), self.prompt_lengths, self.history)
        for processor in self.processors:
            scores = processor(scores, rows)
        return scores

    def see(self, tokens: Tensor) -> None:
        """Take the newest token of each row, [B], which the requests do not count yet."""
        for seen in self.seen:
            seen.see(tokens)
        if self.history is not None:
            self.history.see(tokens, self.prompt_lengths + num_generated(self.requests, tokens.device))

    def see_pending(self, tokens: Tensor, places: Tensor) -> None:
        """Take tokens of the last batch that the requests count as pending, as `History.see_pending`."""
        for seen in self.seen:
            seen.see_pending(tokens, places)
        if self.history is not None:
            lengths = self.prompt_lengths + num_generated(self.requests, tokens.device)
            self.history.see_pending(tokens, places, lengths)


def num_generated(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Return the tokens generated so far, [B]."""
    return _column(requests, lambda request: request.num_generated, device)


@dataclass(frozen=True, slots=True)
class _Tables:
    """What the checkpoint asks for of every row, on the device.

    before, between, after: processors around the job's own penalty, its minimum and what depends on its maximum.
    end_ids: end tokens that the model can choose; others are no reason to fail, as for transformers.
    """

    before: Sequence[Processor]
    between: Sequence[Processor]
    forced_first: Sequence[Processor]
    forced_last: Tensor | None
    after: Sequence[Processor]
    end_ids: Tensor

    @classmethod
    def of(cls, defaults: GenerationDefaults, end_ids: Sequence[int], num_tokens: int, device: torch.device) -> _Tables:
        """Ids beyond the vocabulary are left out: nobody can choose them."""

        def known(ids: Sequence[int]) -> list[int]:
            return [token for token in ids if 0 <= token < num_tokens]

        def marked(ids: Sequence[int]) -> Tensor:
            marks = torch.zeros(num_tokens, dtype=torch.bool)
            marks[known(ids)] = True
            return marks.to(device)

        ends = torch.tensor(known(end_ids), dtype=torch.long, device=device)
        # An end token that is banned alone would make answers endless: as in transformers it is not.
        bans = [(ids, -torch.inf) for ids in defaults.bad_words_ids if not (len(ids) == 1 and ids[0] in end_ids)]
        sizes = ((defaults.no_repeat_ngram_size, False), (defaults.encoder_no_repeat_ngram_size, True))
        between: list[Processor] = [NoRepeatNGram(size, in_prompt) for size, in_prompt in sizes if size]
        after: list[Processor] = [RemoveInvalid()] if defaults.remove_invalid_values else []
        if defaults.exponential_decay_length_penalty is not None and len(ends):
            after.append(LengthDecay(*defaults.exponential_decay_length_penalty, ends))
        if defaults.suppress_tokens:
            after.append(Suppress(marked(defaults.suppress_tokens)))
        first, last = known(defaults.forced_bos_token_id), known(defaults.forced_eos_token_id)
        if defaults.begin_suppress_tokens:
            after.append(SuppressFirst(marked(defaults.begin_suppress_tokens), has_forced_first=bool(first)))
        return cls(
            before=[SequenceBias.of(defaults.sequence_bias, num_tokens, device)] if defaults.sequence_bias else [],
            between=[*between, *([SequenceBias.of(bans, num_tokens, device)] if bans else [])],
            forced_first=[ForcedFirst(marked(first))] if first else [],
            forced_last=marked(last) if last else None,
            after=after,
            end_ids=ends,
        )


class ProcessingFactory:
    """Makes `Processing` for batches of one model. Engine thread only."""

    def __init__(self, end_ids: Sequence[int], defaults: GenerationDefaults) -> None:
        self._end_ids = frozenset(end_ids)
        self._defaults = defaults
        self._tables: _Tables | None = None
        sequences = (*defaults.bad_words_ids, *(ids for ids, _ in defaults.sequence_bias))
        has_sizes = defaults.no_repeat_ngram_size or defaults.encoder_no_repeat_ngram_size
        self._reads_history = bool(has_sizes) or any(len(ids) > 1 for ids in sequences)

    def make(self, requests: Sequence[Request], num_tokens: int, device: torch.device) -> Processing | None:
        """Return the processing of a batch with logits [B, num_tokens] on `device`, the same for all batches.

        None when there is nothing to change.
        """
        if self._tables is None:
            self._tables = _Tables.of(self._defaults, sorted(self._end_ids), num_tokens, device)
        tables = self._tables
        penalty = _repetition_penalty(requests, num_tokens, device)
        processors = [
            *tables.before,
            *_prompt_penalty(requests, self._defaults.encoder_repetition_penalty, num_tokens, device),
            *penalty,
            *tables.between,
            *_min_new_tokens(requests, tables.end_ids, device),
            *tables.forced_first,
            *([] if tables.forced_last is None else [_forced_last(requests, tables.forced_last, device)]),
            *tables.after,
        ]
        if not processors:
            return None
        return Processing(
            requests,
            processors,
            _column(requests, lambda request: len(request.prompt_ids), device),
            History.of(requests, device) if self._reads_history else None,
            [each.seen for each in penalty],
        )


def _repetition_penalty(
    requests: Sequence[Request], num_tokens: int, device: torch.device
) -> Sequence[RepetitionPenalty]:
    rows = [row for row, request in enumerate(requests) if request.sampling.repetition_penalty != 1]
    if not rows:
        return []
    factors = torch.tensor([requests[row].sampling.repetition_penalty for row in rows])
    seen = Seen.of([known_ids(requests[row]) for row in rows], rows, num_tokens, device)
    return [RepetitionPenalty(seen, to_device(factors, device)[:, None])]


def _prompt_penalty(
    requests: Sequence[Request], penalty: float, num_tokens: int, device: torch.device
) -> Sequence[RepetitionPenalty]:
    """transformers' encoder_repetition_penalty: the prompt's tokens become likelier, of decoder-only models too."""
    if penalty == 1:
        return []
    seen = Seen.of([request.prompt_ids for request in requests], range(len(requests)), num_tokens, device)
    return [RepetitionPenalty(seen, to_device(torch.full((len(requests), 1), 1 / penalty), device))]


def _min_new_tokens(requests: Sequence[Request], end_ids: Tensor, device: torch.device) -> Sequence[MinNewTokens]:
    if not (len(end_ids) and any(request.sampling.min_new_tokens for request in requests)):
        return []
    return [MinNewTokens(_column(requests, lambda request: request.sampling.min_new_tokens, device), end_ids)]


def _forced_last(requests: Sequence[Request], allowed: Tensor, device: torch.device) -> ForcedLast:
    return ForcedLast(allowed, _column(requests, lambda request: request.max_new_tokens, device))


def _column(requests: Sequence[Request], number: Callable[[Request], int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([number(request) for request in requests]), device)
