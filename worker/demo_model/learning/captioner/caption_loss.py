"""The captioning loss: cross entropy of the captions' tokens, given the picture.

Several captions of one picture share one row behind the picture's vectors; none sees another, and each has positions of
its own, so each has the same loss as alone in a row, for less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from worker.demo_model.learning.encoding import IGNORED


@dataclass(frozen=True, slots=True)
class Said:
    """One caption: `ids` with start and end token; the first `num_given` of them are not learnt; `weight` per token."""

    ids: tuple[int, ...]
    num_given: int = 1
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed captions, padded on the right: `ids`, `positions`, `owner` (which caption, 0 for padding), `labels` (the
    next token, or −100) and `weights`, all `[b, t]`."""

    ids: Tensor
    positions: Tensor
    owner: Tensor
    labels: Tensor
    weights: Tensor


def pack(rows: Sequence[Sequence[Said]], pad: int) -> Rows:
    """One row per picture."""
    length = max(sum(len(said.ids) for said in row) for row in rows)
    shape = (len(rows), length)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    positions, owner = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    for i, row in enumerate(rows):
        start = 0
        for number, said in enumerate(row, 1):
            stop, first = start + len(said.ids), start + said.num_given - 1
            ids[i, start:stop] = torch.tensor(said.ids)
            positions[i, start:stop] = torch.arange(len(said.ids))
            owner[i, start:stop] = number
            labels[i, first : stop - 1] = ids[i, first + 1 : stop]
            weights[i, first : stop - 1] = said.weight
            start = stop
    return Rows(ids, positions, owner, labels, weights)


def caption_loss(model: Any, seen: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Weighted mean loss per learnt token of captions of pictures `seen` `[b, 17, 192]`; and, per token `[b, t]`,
    whether it was the most likely one (true where nothing is learnt)."""
    text = model.git.embeddings(input_ids=rows.ids, position_ids=rows.positions)
    picture = model.git.visual_projection(seen)
    hidden = torch.cat([picture, text], dim=1)
    hidden = model.git.encoder(hidden, attention_mask=_mask(rows, picture.shape[1])).last_hidden_state
    is_learnt = rows.labels != IGNORED
    logits, wanted = model.output(hidden[:, picture.shape[1] :][is_learnt]), rows.labels[is_learnt]
    weights = rows.weights[is_learnt]
    loss = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
    is_right = torch.ones_like(is_learnt)
    is_right[is_learnt] = logits.argmax(-1) == wanted
    return loss, is_right


def _mask(rows: Rows, num_picture: int) -> Tensor:
    """Additive mask `[b, 1, s, s]`: the picture sees itself, a token the picture and its own caption up to itself."""
    num, length = rows.ids.shape
    total = num_picture + length
    visible = torch.zeros(num, total, total, dtype=torch.bool)
    visible[:, :, :num_picture] = True
    is_same = rows.owner[:, :, None] == rows.owner[:, None, :]
    visible[:, num_picture:, num_picture:] = is_same & torch.ones(length, length).tril().bool()
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
