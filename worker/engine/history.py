"""What the rows of a batch have said so far, on the device: tokens in order, and which tokens at all.

Both are built from what the host knows and then told each new token, so that nobody waits for tokens to come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.request import Request
from worker.engine.transfer import to_device


def known_ids(request: Request) -> Tensor:
    """Return the ids of prompt and answer that the host knows, int64 [T]."""
    return torch.cat((request.prompt_ids, torch.tensor(request.output_ids).long()))


@dataclass(frozen=True, slots=True)
class History:
    """ids [B, C] of prompt and answer from the left; what lies behind a row's length means nothing."""

    ids: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> History:
        """Return the history of `requests`, with room for all that they may still say."""
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
