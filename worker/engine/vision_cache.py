"""What the vision tower made of pictures, kept by what they are. Bounded in bytes, least recently used goes first.

Engine thread only; its counters may be read from any thread.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """What the tower says of one picture, on the tower's device.

    pooled: one tensor for each of the picture's outputs, ready for the text model.
    deepstack: the same for each of the text model's first layers, where the family feeds them too (Qwen3-VL).
    """

    pooled: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.pooled, *(tensor for layer in self.deepstack for tensor in layer))

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)


class FeatureCache:
    """`max_bytes` of 0 keeps nothing, and what is larger than all of it is not kept either."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Features] = OrderedDict()  # least recently used first
        self.num_bytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Features | None:
        """Return the features of that picture, if they are kept."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, features: Features) -> None:
        """Keep features that are not kept yet; others make room."""
        if key in self._entries or features.num_bytes > self._max_bytes:
            return
        while self.num_bytes + features.num_bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.num_bytes
            self.num_evicted += 1
        self._entries[key] = features
        self.num_bytes += features.num_bytes

    def clear(self) -> None:
        """Give the memory back."""
        self._entries.clear()
        self.num_bytes = 0
