"""Encoded examples, alone and as batches: the forward's arguments, with labels on what the model learns to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.errors import InvalidRequest
from worker.media.types import DecodedMedia
from worker.training.example import Example

#: The label that torch's cross entropy skips.
IGNORED: Final = -100


class UnsafeTemplate(InvalidRequest):
    """Raised when it cannot be derived from a model's template which tokens are to be learnt."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example, batch 1. `tensors` are the forward's arguments; `labels` [1, t] are as long as `input_ids`."""

    tensors: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right: `input_ids`, `attention_mask` and `labels` [b, t], and the pixels' tensors."""

    tensors: Mapping[str, Tensor]
    labels: Tensor

    def arguments(self) -> dict[str, Tensor]:
        """Return all arguments of the model's forward, the labels included."""
        return {**self.tensors, "labels": self.labels}


class Encoder(Protocol):
    """Encodes the examples of one recipe for one model. Immutable; any thread, also in a forked process."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""

    def row(self, example: Example, text: str | None, media: Sequence[DecodedMedia]) -> Row:
        """Encode one example. text: the caption that is learnt; None for a conversation. media: of its files.

        Raises InvalidRequest for an example that the model cannot learn, UnsafeTemplate when its labels are not clear.
        """

    def join(self, rows: Sequence[Row]) -> Batch:
        """Return the rows as one batch. The rows may have different numbers of media, also none."""


def check_length(num_tokens: int, max_length: int) -> None:
    """Raise InvalidRequest for a row that is longer than the model."""
    if num_tokens > max_length:
        raise InvalidRequest(f"{num_tokens} tokens, the model's limit is {max_length}")


def join_rows(rows: Sequence[Row], pad_id: int, *, has_row_per_example: bool) -> Batch:
    """Pad every row on the right, and stack.

    has_row_per_example: the first dimension of pixels is the example, not the picture (Idefics): an example without
    pictures is then zeros, which these families skip.
    """
    length = max(row.labels.shape[1] for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row.tensors))
    fills = {"input_ids": pad_id}
    return Batch(
        {
            name: _stack_texts([row.tensors[name] for row in rows], length, fills.get(name, 0))
            if all(name in row.tensors and row.tensors[name].shape == row.labels.shape for row in rows)
            else _stack_pixels([row.tensors.get(name) for row in rows], has_row_per_example=has_row_per_example)
            for name in names
        },
        _stack_texts([row.labels for row in rows], length, IGNORED),
    )


def _stack_texts(rows: Sequence[Tensor], length: int, fill: int) -> Tensor:
    return torch.cat([pad(row, (0, length - row.shape[1]), value=fill) for row in rows])


def _stack_pixels(rows: Sequence[Tensor | None], *, has_row_per_example: bool) -> Tensor:
    """Concatenate along the first dimension, with zeros where another row is larger in the others."""
    given = [row for row in rows if row is not None]
    most = [max(sizes) for sizes in zip(*(row.shape[1:] for row in given), strict=True)]
    if has_row_per_example:
        given = [given[0].new_zeros((1, *most)) if row is None else row for row in rows]
    return torch.cat([pad(row, _padding(row.shape[1:], most)) for row in given])


def _padding(sizes: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return torch's argument, which begins with the last dimension."""
    return [side for size, wanted in zip(reversed(sizes), reversed(most), strict=True) for side in (0, wanted - size)]
