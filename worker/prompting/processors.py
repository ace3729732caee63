"""The processor in its two forms, and what both make of user text: the loaded one, and one that keeps literals text.

In: a loaded model. Out: which of the two reads a text. Called from many threads at once; nothing changes after
construction.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from worker.models.loader import LoadedModel
from worker.prompting.literals import ControlTokens, literal_tokenizer

#: Training targets; a forward that sees them computes a loss.
_NOT_FOR_INFERENCE = ("labels",)


class Processors:
    """`plain` is the loaded processor; `marked` is a copy whose tokenizer drops the marks inside literals."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.plain: ProcessorMixin = loaded.processor
        self.marked: ProcessorMixin = copy.copy(loaded.processor)
        self.marked.tokenizer = literal_tokenizer(loaded.tokenizer)
        self.control = ControlTokens(loaded.tokenizer, _placeholders(loaded))
        for processor in (self.plain, self.marked):
            # The first call settles the tokenizer's truncation and padding; changing them under other threads fails.
            processor.tokenizer("", return_tensors=None)

    def control_ids(self, tensors: Mapping[str, Tensor]) -> Counter[int]:
        """Count the control tokens in a prompt's ids."""
        return Counter(token for token in tensors["input_ids"][0].tolist() if token in self.control.ids)


def _placeholders(loaded: LoadedModel) -> set[str]:
    tokens = [getattr(loaded.processor, name, None) for name in ("image_token", "video_token")]
    return {str(token) for token in (*tokens, loaded.capabilities.video_token) if token}


def tensors_of(encoded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the forward takes of a processor's output."""
    return {
        name: value for name, value in encoded.items() if isinstance(value, Tensor) and name not in _NOT_FOR_INFERENCE
    }


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors, those of floating point in `dtype`."""
    return {name: value.to(dtype) if torch.is_floating_point(value) else value for name, value in tensors.items()}
