"""The arguments by which each family's processor limits the pixels of a picture or frame.

In: a loaded processor, and limits in pixels. Out: the processor's arguments for them. `size` has a different meaning in
each family, so every `SizeRule` is a candidate until worker.prompting.pixel_limits has tested it. The pixels of a
picture are all that the vision tower gets after resizing, crops and overview included. Processors round to whole
patches or tiles, and every picture has at least one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from transformers import PreTrainedConfig, ProcessorMixin

from api_stub.contract.media import MediaOptions

Arguments = Mapping[str, Any]

#: A larger value named "edge" is really a number of pixels.
MAX_EDGE: Final = 4096


class SizeRule(Protocol):
    """How one kind of processor takes limits of pixels.

    takes_min: pictures can be enlarged on request.
    least: pixels of a picture at least, whatever the limits.
    """

    @property
    def takes_min(self) -> bool: ...
    @property
    def least(self) -> int: ...
    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        """Return the sub-processor's arguments; `num_frames` per clip. Raises ValueError for limits that it cannot
        satisfy.
        """
        ...


def rules_for_pictures(processor: ProcessorMixin, config: PreTrainedConfig) -> list[SizeRule]:
    """Return the rules that this image processor may follow, likelier ones first."""
    images = processor.image_processor
    size = _edges(getattr(images, "size", None))
    rules: list[SizeRule] = []
    tile = _edges(getattr(images, "max_image_size", None)).get("longest_edge")
    if tile and "longest_edge" in size:
        rules.append(TilesOfLongestEdge(tile, size["longest_edge"]))
    if {"shortest_edge", "longest_edge"} <= size.keys():
        least = _product(images, "patch_size", "merge_size") ** 2
        frames = _product(images, "temporal_patch_size")
        # GLM copies a picture to the frames of a clip and counts the pixels of all of them.
        rules += [PixelCounts(size["shortest_edge"], size["longest_edge"], least, factor) for factor in (1, frames)]
    if size.get("longest_edge", MAX_EDGE + 1) <= MAX_EDGE:
        patch = _product(processor, "patch_size", "spatial_merge_size")
        if patch == 1:
            patch = _product(getattr(config, "vision_config", None), "patch_size")
        # Idefics2 resizes a picture and its four quarters alike.
        copies = 5 if getattr(images, "do_image_splitting", False) else 1
        rules.append(LongestEdge(size.get("shortest_edge"), size["longest_edge"], patch, copies))
    if "height" in size and "width" in size and isinstance(getattr(images, "max_patches", None), int):
        rules.append(NumTiles(size["height"] * size["width"], images.max_patches))
    return rules


def rules_for_clips(processor: ProcessorMixin, pictures: SizeRule) -> list[SizeRule]:
    """Return the rules that this video processor may follow, likelier ones first."""
    videos = processor.video_processor
    size = _edges(getattr(videos, "size", None))
    rules: list[SizeRule] = []
    if {"shortest_edge", "longest_edge"} <= size.keys():
        least = _product(videos, "patch_size", "merge_size") ** 2
        # A checkpoint's own cap has other units and would take precedence.
        fixed = {"cap_pixels_per_frame": False} if hasattr(videos, "cap_pixels_per_frame") else {}
        bounds = size["shortest_edge"], size["longest_edge"], least
        rules.append(PixelCounts(*bounds, fixed=fixed))
        rules.append(PixelCounts(*bounds, step=_product(videos, "temporal_patch_size"), fixed=fixed))
    return [*rules, FixedSize(pictures.least)]


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """`size` names pixels, not edges: Qwen-VL, GLM-4V and those after them.

    own_min, own_max: the checkpoint's. factor: frames that one picture counts as.
    step: a clip's frames are counted together, in multiples of this; 0: each frame on its own.
    fixed: further arguments, given together with a maximum.
    """

    own_min: int
    own_max: int
    least: int
    factor: int = 1
    step: int = 0
    fixed: Arguments = field(default_factory=dict)

    @property
    def takes_min(self) -> bool:
        return True

    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        least, most = self._counted_as(num_frames)
        longest = self.own_max if limits.max_pixels is None else limits.max_pixels * least
        # Processors round edges up, so the minimum stays well below the maximum: a small picture must not exceed it.
        shortest = min(self.own_min, max(1, longest // 4)) if limits.min_pixels is None else limits.min_pixels * most
        if limits.max_pixels is None and shortest > longest:
            raise ValueError(f"min_pixels of {limits.min_pixels} is above the checkpoint's own most, {longest // most}")
        fixed = self.fixed if limits.max_pixels is not None else {}
        return {"size": {"shortest_edge": min(shortest, longest), "longest_edge": longest}, **fixed}

    def _counted_as(self, num_frames: Sequence[int]) -> tuple[int, int]:
        """Return the fewest and most frames that the processor may count, rounding to whole steps."""
        if not self.step or not num_frames:
            return self.factor, self.factor
        counts = [count for frames in num_frames for count in (frames, round(frames / self.step) * self.step)]
        return min(counts), max(counts)


@dataclass(frozen=True, slots=True)
class LongestEdge:
    """`size` names edges: Idefics2, Pixtral, Mistral 3. The longest is the root of the limit, in whole patches.

    So only a square picture uses the whole limit. Never above the checkpoint's own edge: it has no positions beyond.
    own_shortest: edges are enlarged to it; None: nothing is enlarged. copies: pictures of that size per picture.
    """

    own_shortest: int | None
    own_longest: int
    patch: int
    copies: int = 1

    @property
    def takes_min(self) -> bool:
        return self.own_shortest is not None

    @property
    def least(self) -> int:
        return self.copies * self.patch**2

    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        longest = self.own_longest
        if limits.max_pixels is not None:
            root = math.isqrt(limits.max_pixels // self.copies)
            longest = min(longest, max(self.patch, root // self.patch * self.patch))
        if self.own_shortest is None:
            return {"size": {"longest_edge": longest}}
        shortest = min(self.own_shortest, max(self.patch, longest * self.own_shortest // self.own_longest))
        if limits.min_pixels is not None:
            shortest = max(shortest, math.isqrt(-(-limits.min_pixels // self.copies) - 1) + 1)
            if limits.max_pixels is None and shortest > longest:
                own = self.copies * self.own_longest**2
                raise ValueError(f"min_pixels of {limits.min_pixels} is above the checkpoint's own most, {own}")
        return {"size": {"shortest_edge": min(shortest, longest), "longest_edge": longest}}


@dataclass(frozen=True, slots=True)
class TilesOfLongestEdge:
    """`size` names the longest edge, which is cut into square tiles beside an overview: Idefics3, SmolVLM.

    Every picture is enlarged to that edge, so there is no minimum to set.
    """

    tile: int
    own_longest: int

    @property
    def takes_min(self) -> bool:
        return False

    @property
    def least(self) -> int:
        return self.tile**2

    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        longest = self.own_longest
        if limits.max_pixels is not None:
            num_tiles = limits.max_pixels // self.least
            per_edge = math.isqrt(num_tiles - 1) if num_tiles >= 5 else 1
            longest = min(longest, per_edge * self.tile)
        return {"size": {"longest_edge": longest}}


@dataclass(frozen=True, slots=True)
class NumTiles:
    """The limit is a number of tiles beside an overview: InternVL and those after it."""

    least: int
    own_max: int

    @property
    def takes_min(self) -> bool:
        return False

    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        if limits.max_pixels is None:
            return {}
        num_tiles = limits.max_pixels // self.least
        most = min(self.own_max, num_tiles - 1 if num_tiles >= 3 else 1)
        return {"max_patches": most, "min_patches": 1}


@dataclass(frozen=True, slots=True)
class FixedSize:
    """There is nothing to set: every frame has the least pixels of a picture anyway (SmolVLM's clips)."""

    least: int

    @property
    def takes_min(self) -> bool:
        return False

    def arguments(self, limits: MediaOptions, num_frames: Sequence[int] = ()) -> Arguments:
        return {}


def _edges(size: object) -> dict[str, int]:
    """Return the entries of a size that are set; transformers holds it as a mapping of its own."""
    try:
        entries = dict(size)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return {}
    return {str(name): value for name, value in entries.items() if isinstance(value, int) and value > 0}


def _product(owner: object, *names: str) -> int:
    """Return the product of attributes that are numbers, 1 for what is absent."""
    values = [getattr(owner, name, 1) for name in names]
    return math.prod(value if isinstance(value, int) and value > 0 else 1 for value in values)
