"""Runs the vision tower on pictures of any prompts, and keeps what it made of them.

The tower is called as `generate` calls it, and the model takes the output as it takes `generate`'s
(`mm_encoder_outputs`), so no line of any model changes. Whether pictures of a family can be told apart and seen
together is found out by trying. `FeatureCache` keeps features by the pictures' content, bounded in bytes, least
recently used out first. Engine thread only; the cache's counters may be read from any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from cachetools import LRUCache
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.pictures import Picture, TowerHook, is_framed, joined
from worker.engine.tensors import are_close

logger = logging.getLogger(__name__)

_FACTS: Final = {"action": "engine.vision"}
#: Pixels of a call, padding included, over those of its pictures.
MAX_PADDING: Final = 1.5


@dataclass(frozen=True, slots=True)
class Features:
    """What the tower returns for one picture, on the tower's device.

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
        self._entries: LRUCache[bytes, Features] = LRUCache(max_bytes, getsizeof=lambda features: features.num_bytes)
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all features that are kept."""
        return int(self._entries.currsize)

    def get(self, key: bytes) -> Features | None:
        """Return the features of that picture, if they are kept."""
        return self._entries.get(key)

    def put(self, key: bytes, features: Features) -> None:
        """Keep features that are not kept yet; others make room."""
        if key in self._entries or features.num_bytes > self._entries.maxsize:
            return
        num_before = len(self._entries)
        self._entries[key] = features
        self.num_evicted += num_before + 1 - len(self._entries)

    def clear(self) -> None:
        """Give the memory back."""
        self._entries.clear()


class CannotSeparate(Exception):
    """Raised when what the tower returns cannot be told apart by picture."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a family's tower wraps what it returns."""

    output: Callable[..., Any]
    is_one_tensor: bool


class VisionTower:
    """One modality's tower. Engine thread only.

    num_calls, num_seen: calls so far, and pictures in them.
    """

    def __init__(self, model: PreTrainedModel, hook: TowerHook) -> None:
        self.hook = hook
        self.num_calls = 0
        self.num_seen = 0
        self._model = model
        self._form: _Form | None = None
        #: By whether pictures have to be padded to be seen together: whether that gives what each alone gives.
        self._can_join: dict[bool, bool] = {}

    def call(self, tensors: Mapping[str, Tensor], num_pictures: int) -> Any:
        """Return the tower's own output. Raises whatever the model raises."""
        device, dtype = self._model.device, self._model.dtype
        arguments = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in tensors.items()
        }
        self.num_calls += 1
        self.num_seen += num_pictures
        output = self.hook.encode(**arguments, return_dict=True)
        self._form = _Form(type(output), isinstance(output.pooler_output, Tensor))
        return output

    def see(self, pictures: Sequence[Picture]) -> list[Features]:
        """Return the features of pictures that fit together, seen in one call if that is as good as one by one.

        Raises CannotSeparate, and whatever the model raises.
        """
        if len(pictures) == 1:
            return self._see_together(pictures)
        is_padded = len({_shapes(picture) for picture in pictures}) > 1
        if is_padded not in self._can_join:
            alone = [self._see_together([picture])[0] for picture in pictures[:2]]
            self._can_join[is_padded] = self._are_alike(pictures[:2], alone)
            return [*alone, *(self.see(pictures[2:]) if len(pictures) > 2 else [])]
        if not self._can_join[is_padded]:
            return [self._see_together([picture])[0] for picture in pictures]
        return self._see_together(pictures)

    def separated(self, output: Any, pictures: Sequence[Picture]) -> list[Features]:
        """Cut the output of a call into its pictures' features. Raises CannotSeparate."""
        pooled = list(output.pooler_output)
        deepstack = [list(layer) for layer in getattr(output, "deepstack_features", None) or ()]
        num_outputs = sum(picture.num_outputs for picture in pictures)
        if any(len(each) != num_outputs for each in (pooled, *deepstack)):
            raise CannotSeparate(f"{len(pooled)} outputs of {len(pictures)} pictures")
        features, at = [], 0
        for picture in pictures:
            end = at + picture.num_outputs
            features.append(Features(_own(pooled[at:end]), tuple(_own(layer[at:end]) for layer in deepstack)))
            at = end
        return features

    def output(self, features: Sequence[Features]) -> Any:
        """Return what the tower would have returned for a prompt with these pictures. Needs one call before."""
        assert self._form is not None, "features come out of a call"
        pooled = [tensor for each in features for tensor in each.pooled]
        deepstack = [
            [tensor for layer in layers for tensor in layer]
            for layers in zip(*(f.deepstack for f in features), strict=True)
        ]
        returned: dict[str, Any] = {"pooler_output": torch.stack(pooled) if self._form.is_one_tensor else pooled}
        return self._form.output(**returned, **({"deepstack_features": deepstack} if deepstack else {}))

    def _see_together(self, pictures: Sequence[Picture]) -> list[Features]:
        return self.separated(self.call(joined(pictures), len(pictures)), pictures)

    def _are_alike(self, pictures: Sequence[Picture], alone: Sequence[Features]) -> bool:
        try:
            together = self._see_together(pictures)
        except (CannotSeparate, RuntimeError, ValueError, IndexError, TypeError) as error:
            logger.warning("pictures cannot be encoded in one batch", extra=_FACTS | {"reason": type(error).__name__})
            return False
        are_alike = all(
            len(one.tensors) == len(other.tensors) and all(map(are_close, one.tensors, other.tensors))
            for one, other in zip(together, alone, strict=True)
        )
        if not are_alike:
            logger.warning("pictures cannot be encoded in one batch", extra=_FACTS | {"reason": "features differ"})
        return are_alike


def calls(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Put pictures that fit together, of the same size or nearly, into one call each."""
    kinds: dict[tuple[object, ...], list[Picture]] = {}
    for picture in pictures:
        kinds.setdefault(_kind(picture), []).append(picture)
    for alike in kinds.values():
        call: list[Picture] = []
        # From the smallest: a call ends where a picture would pad the ones before it too much.
        for picture in sorted(alike, key=lambda each: each.num_values):
            num_values = picture.num_values + sum(each.num_values for each in call)
            if call and is_framed(picture.tensors) and picture.num_values * (len(call) + 1) > MAX_PADDING * num_values:
                yield call
                call = []
            call.append(picture)
        yield call


def _kind(picture: Picture) -> tuple[object, ...]:
    shapes = () if is_framed(picture.tensors) else _shapes(picture)
    types = tuple((name, tensor.dtype, tensor.ndim) for name, tensor in picture.tensors.items())
    return (picture.modality, types, shapes)


def _shapes(picture: Picture) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape[1:]) for tensor in picture.tensors.values())


def _own(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors that do not keep the rest of their call's output in memory."""
    return tuple(tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor for tensor in tensors)
