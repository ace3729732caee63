"""Chooses the next tokens of a batch, one after the other when memory does not hold all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.engine.faults import is_out_of_memory
from worker.engine.request import Request
from worker.engine.sampler import Sampler

logger = logging.getLogger(__name__)


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
            logger.warning("sampling one by one", extra={"action": "engine.sample"})
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
