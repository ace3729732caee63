"""Brings the pictures of waiting requests through the vision tower: together, a few per step, and no picture twice.

In: requests with their pictures. Out: the keyword arguments of the model's forward, with features in place of pixels.
A prompt whose pictures cannot be told apart goes the model's own way, pixels and all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final

import torch
from torch import Tensor

from worker.engine.adapters import Adapters
from worker.engine.batch import NoRoom, VisionStats
from worker.engine.cache_scope import CacheScopes
from worker.engine.config import MEBIBYTE, VisionConfig
from worker.engine.model_hooks import ModelHooks
from worker.engine.pictures import Cut, Picture, cut, tower_hooks
from worker.engine.request import GenerationRequest, Request
from worker.engine.tensors import are_close
from worker.engine.vision.encoder import CannotSeparate, FeatureCache, Features, VisionTower, calls

logger = logging.getLogger(__name__)

#: Features that may lie ready for waiting requests; beyond, only the first in line gets more: blocks may be short.
MAX_READY_BYTES: Final = 512 * MEBIBYTE
#: Trials that may end in an error, perhaps the prompt's own, before prompts of a kind are left alone.
MAX_FAILED_TRIALS: Final = 3

#: Modalities of a prompt's pictures and how they were cut out of it.
_Kind = frozenset[tuple[str, Cut]]


class _Way(Enum):
    """How the pictures of prompts of one kind reach the text model."""

    UNTRIED = auto()
    AS_FEATURES = auto()
    AS_PIXELS = auto()


@dataclass(slots=True)
class _Needed:
    """What one request needs before it can be opened: features of all its pictures, unless the model gets pixels."""

    features: dict[bytes, Features] = field(default_factory=dict)
    error: Exception | None = None
    gets_pixels: bool = False


class VisionStage:
    """Engine thread only, but for `cut` and `stats`. scopes: of the keys of what is cached."""

    def __init__(self, hooks: ModelHooks, config: VisionConfig, scopes: CacheScopes | None = None) -> None:
        self._hooks = hooks
        self.scopes = scopes or CacheScopes()
        self._tower_hooks = tower_hooks(hooks.model)
        self._towers = {modality: VisionTower(hooks.model, hook) for modality, hook in self._tower_hooks.items()}
        self.cache_bytes = config.cache_bytes
        self._max_pictures = config.max_pictures
        self._cache = FeatureCache(config.cache_bytes)
        self._needed: dict[Request, _Needed] = {}
        self._ways: dict[_Kind, _Way] = {}
        self._num_failed_trials: Counter[_Kind] = Counter()
        self._num_hits = self._num_misses = 0

    def cut(self, generation: GenerationRequest) -> tuple[Picture, ...]:
        """Return a prompt's pictures; any thread. Raises InvalidRequest for an adapter that is not served."""
        return cut(self._tower_hooks, generation.inputs, self.scopes.of(generation.adapter))

    def stats(self) -> VisionStats:
        """Return the counters, which may be a step apart from each other; any thread."""
        return VisionStats(
            hits=self._num_hits,
            misses=self._num_misses,
            evictions=self._cache.num_evicted,
            num_entries=len(self._cache),
            num_bytes=self._cache.num_bytes,
            num_encoded=sum(tower.num_seen for tower in self._towers.values()),
            num_tower_calls=sum(tower.num_calls for tower in self._towers.values()),
        )

    def clear(self) -> None:
        """Give the cache's memory back."""
        self._cache.clear()

    def forget(self, request: Request) -> None:
        """Let go of what was kept for a request."""
        self._needed.pop(request, None)

    def look_ahead(self, requests: Sequence[Request]) -> None:
        """Let the tower see pictures of waiting requests, the first request's first, and no more than a step may."""
        wanted: dict[bytes, Picture] = {}
        seen: dict[bytes, Features] = {}
        ready: dict[bytes, int] = {}
        line: list[Request] = []
        for request in requests:
            if sum(ready.values()) >= MAX_READY_BYTES:
                break
            line.append(request)
            missing = [picture for picture in self._missing(request) if picture.key not in seen]
            ready |= {key: features.num_bytes for key, features in self._needed[request].features.items()}
            num_left = self._max_pictures - len(seen) - len(wanted)
            if missing and num_left > 0 and self._ways.get(_kind(request), _Way.UNTRIED) is _Way.UNTRIED:
                seen |= self._try(request)
            else:
                new = [picture for picture in missing if picture.key not in wanted]
                wanted |= {picture.key: picture for picture in new[: max(num_left, 0)]}
        failed: dict[bytes, Exception] = {}
        for call in calls(list(wanted.values())):
            self._call(call, seen, failed)
        if seen or failed:
            self._hand_out(seen, failed, line)

    def check(self, request: Request) -> None:
        """Raise NoRoom while pictures of a prompt have to wait for their turn, or what the tower raised for one."""
        if request not in self._needed:
            self.look_ahead([request])
        is_missing = bool(self._missing(request))
        needed = self._needed[request]
        if needed.error is not None and not needed.gets_pixels:
            self.forget(request)
            raise needed.error
        if is_missing:
            raise NoRoom

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return what the model's forward takes for a prompt. Raises what `check` raises."""
        self.check(request)
        needed = self._needed[request]
        if needed.gets_pixels or not request.pictures:
            return self._hooks.on_device(request.inputs)
        return self._with_features(request, needed.features)

    def _missing(self, request: Request) -> list[Picture]:
        """Return the pictures that the tower still has to see; what the cache has is held for the request."""
        needed = self._needed.setdefault(request, _Needed())
        if self._ways.get(_kind(request)) is _Way.AS_PIXELS:
            needed.gets_pixels = True
        if needed.gets_pixels or needed.error is not None:
            return []
        missing: dict[bytes, Picture] = {}
        for picture in request.pictures:
            if picture.key in needed.features:
                continue
            features = self._cache.get(picture.key)
            if features is None:
                missing[picture.key] = picture
            else:
                self._hold(needed, picture.key, features, is_hit=True)
        return list(missing.values())

    def _hold(self, needed: _Needed, key: bytes, features: Features, *, is_hit: bool) -> None:
        needed.features[key] = features
        self._num_hits += is_hit
        self._num_misses += not is_hit

    def _hand_out(
        self, seen: Mapping[bytes, Features], failed: Mapping[bytes, Exception], requests: Sequence[Request]
    ) -> None:
        """Give what the tower returned to every request that waits for it, and to the cache."""
        taken: set[bytes] = set()
        for request in requests:
            needed = self._needed[request]
            for key in {picture.key for picture in request.pictures} - needed.features.keys():
                if key in seen and not needed.gets_pixels:
                    self._hold(needed, key, seen[key], is_hit=key in taken)
                    taken.add(key)
                needed.gets_pixels = needed.gets_pixels or isinstance(failed.get(key), CannotSeparate)
                needed.error = needed.error or failed.get(key)
        for key, features in seen.items():
            self._cache.put(key, features)

    def _call(self, call: list[Picture], seen: dict[bytes, Features], failed: dict[bytes, Exception]) -> None:
        """Show pictures to the tower together; if that fails, one by one, so that each fails alone."""
        try:
            returned = self._towers[call[0].modality].see(call)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self._cache.clear()
            if len(call) == 1:
                logger.warning("picture cannot be encoded", extra={"action": "engine.vision"}, exc_info=True)
                # Its frames hold the tensors of the call.
                failed[call[0].key] = error.with_traceback(None)
                return
            for picture in call:
                self._call([picture], seen, failed)
        else:
            seen.update(zip((picture.key for picture in call), returned, strict=True))

    def _try(self, request: Request) -> dict[bytes, Features]:
        """Find out, on the first prompt of a kind, whether features picture by picture are as good as the tower's own
        output for the whole prompt, and return them if so. A prompt that fails here gets pixels, and then its own
        error if it is to blame.
        """
        kind, needed = _kind(request), self._needed[request]
        try:
            features = self._tried(request)
        except Exception as error:
            logger.warning("trial of the vision encoder failed", extra={"action": "engine.vision"}, exc_info=True)
            self._num_failed_trials[kind] += not isinstance(error, torch.OutOfMemoryError)
            is_over = isinstance(error, CannotSeparate) or self._num_failed_trials[kind] >= MAX_FAILED_TRIALS
            features = None
            if not is_over:
                needed.gets_pixels = True
                return {}
        if features is None:
            facts = {"action": "engine.vision", "kind": str(sorted(kind))}
            logger.warning("pictures of such prompts are not cached", extra=facts)
            self._ways[kind] = _Way.AS_PIXELS
            needed.gets_pixels = True
            return {}
        self._ways[kind] = _Way.AS_FEATURES
        return features

    def _tried(self, request: Request) -> dict[bytes, Features] | None:
        """Return the features of a prompt's pictures, None if with them the text model gets something else."""
        own: dict[str, Any] = {}
        features: dict[bytes, Features] = {}
        for modality, tower in self._towers.items():
            pictures = [picture for picture in request.pictures if picture.modality == modality]
            if not pictures:
                continue
            own[modality] = tower.call(tower.hook.arguments(request.inputs.tensors), len(pictures))
            if pictures[0].cut in (Cut.NONE, Cut.SET):
                features[pictures[0].key] = tower.separated(own[modality], pictures)[0]
            else:
                features |= {picture.key: tower.see([picture])[0] for picture in pictures}
        expected = self._hooks.run_to_decoder(self._without_pixels(request, own))
        got = self._hooks.run_to_decoder(self._with_features(request, features))
        return features if _are_alike(expected, got) else None

    def _with_features(self, request: Request, features: Mapping[bytes, Features]) -> dict[str, Any]:
        returned = {}
        for modality, tower in self._towers.items():
            if its := [features[picture.key] for picture in request.pictures if picture.modality == modality]:
                returned[modality] = tower.output(its)
        return self._without_pixels(request, returned)

    def _without_pixels(self, request: Request, returned: Mapping[str, Any]) -> dict[str, Any]:
        pixels = {hook.pixels: None for hook in self._tower_hooks.values() if hook.pixels in request.inputs.tensors}
        rest = {name: tensor for name, tensor in request.inputs.tensors.items() if name not in pixels}
        tensors = self._hooks.on_device(replace(request.inputs, tensors=rest))
        return {**tensors, **pixels, "mm_encoder_outputs": dict(returned)}


class VisionRunner:
    """What runners of both KV back ends do with a vision stage; and the adapters of the text model, None without."""

    def __init__(self, vision: VisionStage, adapters: Adapters | None) -> None:
        self._vision = vision
        self.adapters = adapters

    def vision_stats(self) -> VisionStats:
        """Return counts of the vision cache; any thread."""
        return self._vision.stats()

    def cut(self, generation: GenerationRequest) -> tuple[Picture, ...]:
        """Return the pictures of a prompt; any thread. Raises InvalidRequest for an adapter that is not served."""
        return self._vision.cut(generation)

    def look_ahead(self, requests: Sequence[Request]) -> None:
        """Bring pictures of waiting requests through the vision tower, as many as a step may."""
        self._vision.look_ahead(requests)

    def leave_model(self) -> None:
        """Take out of the model what was put into it."""
        if self.adapters is not None:
            self.adapters.remove()

    def free_memory(self) -> None:
        """Drop cached features and give the allocator's unused memory back."""
        self._vision.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _kind(request: Request) -> _Kind:
    return frozenset((picture.modality, picture.cut) for picture in request.pictures)


def _are_alike(expected: object, got: object) -> bool:
    """Compare what the text model would get; masks in a mapping are made of the text alone."""
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor) and are_close(expected, got)
    if isinstance(expected, (list, tuple)):
        return isinstance(got, (list, tuple)) and len(got) == len(expected) and all(map(_are_alike, expected, got))
    if isinstance(expected, Mapping):
        return (
            isinstance(got, Mapping)
            and got.keys() == expected.keys()
            and all(_are_alike(expected[name], got[name]) for name in expected)
        )
    return True
