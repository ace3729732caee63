"""Which example comes when, and what is drawn for it: functions of the seed, the step and the example alone.

So a run that is resumed at a step, on another machine or with another number of loader threads, sees the same examples
in the same order as one that was never interrupted. Knows no trainer.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Final

from torch import Tensor

#: Batches per loader thread that are prepared ahead.
_BATCHES_AHEAD: Final = 2


@dataclass(frozen=True, slots=True)
class Key:
    """One example's turn: its place in the training split, and the epoch for which random choices are drawn."""

    epoch: int
    index: int


def keys(num_examples: int, seed: int, start: int = 0) -> Iterator[Key]:
    """Yield the examples of all epochs without end, from the one with the number `start` on.

    Every epoch has an order of its own, which depends on the seed and the epoch only.
    """
    epoch, offset = divmod(start, num_examples)
    while True:
        order = list(range(num_examples))
        Random(f"{seed} {epoch}").shuffle(order)
        yield from (Key(epoch, index) for index in order[offset:])
        epoch, offset = epoch + 1, 0


def step_seed(seed: int, step: int, part: int) -> int:
    """Return the seed of dropout and the like for one part of a step: below 2**32, as numpy requires."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {part}".encode()).digest()[:4])


class Batches:
    """A run's batches in order, from a step on, for transformers' Trainer, which takes it as its data loader.

    encode: makes the model's inputs of a batch; called on loader threads when there are any, so it must allow that.
    Its length is that of the whole run, so that a resumed run counts epochs and steps as the first one did.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Key]], Mapping[str, Tensor]],
        *,
        num_examples: int,
        seed: int,
        batch_size: int,
        num_batches: int,
        first_batch: int = 0,
        num_threads: int = 0,
    ) -> None:
        self._encode = encode
        self._num_examples = num_examples
        self._seed = seed
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._first_batch = first_batch
        self._num_threads = num_threads

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        if not self._num_threads:
            yield from map(self._encode, self._keys())
            return
        pool = ThreadPoolExecutor(self._num_threads, "training-loader")
        waiting: deque[Future[Mapping[str, Tensor]]] = deque()
        try:
            for batch in self._keys():
                waiting.append(pool.submit(self._encode, batch))
                if len(waiting) > _BATCHES_AHEAD * self._num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _keys(self) -> Iterator[Sequence[Key]]:
        stream = keys(self._num_examples, self._seed, self._first_batch * self._batch_size)
        for _ in range(self._num_batches - self._first_batch):
            yield list(islice(stream, self._batch_size))
