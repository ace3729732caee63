"""Samples frames of a clip uniformly, decoding as few as possible.

In: a clip file and a number of frames. Out: upright RGB pictures with their times. The index tells which frames exist
and where decoding may start; frames at the end that FFmpeg cannot decode shorten the clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
from PIL import Image

from worker.errors import MediaCorrupt, MediaTooLarge, MediaUnsupported
from worker.media.clip import Clip, inspect_clip
from worker.media.clip_index import ClipIndex, read_index
from worker.media.clip_reader import HAS_AV1, HOW_TO_GET_AV1, Av1Reader, EndOfClip, FrameReader, OpenCvReader
from worker.media.image import check_size
from worker.media.orientation import View
from worker.media.sniff import MediaFormat
from worker.media.types import DecodedClip, MediaPolicy

#: Passes through one clip: with seeks, without, and twice more when fewer frames than indexed can be decoded.
MAX_PASSES: Final = 4
#: An AVI has decoding times and no presentation times, so frames are counted up to this many. In a longer one they are
#: found by time, which may be some frames off where the codec reorders them.
MAX_COUNTED_FRAMES: Final = 10_000


@dataclass(frozen=True, slots=True)
class ClipOutline:
    """The fields of DecodedClip without the frames."""

    timestamps_s: tuple[float, ...]
    duration_s: float
    fps: float


def sample_clip(path: Path, num_frames: int, policy: MediaPolicy, *, should_stop: Callable[[], None]) -> DecodedClip:
    """Decode `num_frames` frames of the clip at `path` and keep them; else as `stream_clip`."""
    frames: list[Image.Image] = []
    outline = stream_clip(path, num_frames, policy, put=frames.append, restart=frames.clear, should_stop=should_stop)
    return DecodedClip(tuple(frames), outline.timestamps_s, outline.duration_s, outline.fps)


def stream_clip(
    path: Path,
    num_frames: int,
    policy: MediaPolicy,
    *,
    put: Callable[[Image.Image], None],
    restart: Callable[[], None],
    should_stop: Callable[[], None],
) -> ClipOutline:
    """Decode `num_frames` frames of the clip at `path`, spread evenly from its first to its last, and `put` each.

    Frame j of N is frame round(j·(n-1)/(N-1)) of the clip's n, the rule of `numpy.linspace`; a single frame is the
    middle one. A clip of fewer frames gives each of them once: fewer frames than asked, never one twice.
    Frames at the end of a damaged clip that cannot be decoded do not count; when a pass meets one, `restart` is called
    and the frames put so far are void. Frames are as a player shows them: turned and mirrored as the container says,
    with square pixels.

    `should_stop` is called every `STOP_CHECK_FRAMES` frames and raises to abort. Accesses nothing but the file; any
    thread.

    Raises MediaUnsupported (not a clip, no pictures, encrypted, a codec that is not decoded), MediaTooLarge (frames,
    seconds, pixels of a frame or of all sampled frames, before they are decoded), MediaCorrupt (no frame can be read).
    """
    clip = inspect_clip(path)
    if clip.is_av1 and not HAS_AV1:
        raise MediaUnsupported(
            f"the {clip.format.value} video's codec {clip.undecoded} is not decoded: {HOW_TO_GET_AV1}"
        )
    try:
        clip, index = _indexed(clip, policy, should_stop)
        may_seek = True
        for _ in range(MAX_PASSES):
            if index.num_frames == 0:
                break
            try:
                with _reader(clip, index, may_seek=may_seek, should_stop=should_stop) as reader:
                    return _sample(reader, clip, index, num_frames, policy, put)
            except EndOfClip as end:
                restart()
                if not may_seek or not reader.may_seek:
                    index = index.first(end.num_frames)
                may_seek = False
    except cv2.error as error:
        raise MediaCorrupt(f"the video cannot be decoded (OpenCV error {error.code})") from error
    if clip.undecoded and not clip.is_av1:
        raise MediaUnsupported(f"the {clip.format.value} video's codec {clip.undecoded} is not decoded")
    raise MediaCorrupt("the video has no frames that can be decoded")


def uniform_positions(num_available: int, num_wanted: int) -> list[int]:
    """Return positions from 0 to `num_available` - 1, evenly spaced, each once, growing."""
    if num_wanted >= num_available:
        return list(range(num_available))
    if num_wanted == 1:
        return [(num_available - 1) // 2]
    steps = num_wanted - 1
    return [(2 * j * (num_available - 1) + steps) // (2 * steps) for j in range(num_wanted)]


def _indexed(clip: Clip, policy: MediaPolicy, should_stop: Callable[[], None]) -> tuple[Clip, ClipIndex]:
    """Index a clip; if FFmpeg does not open it, once more with its metadata hidden, which may be broken."""
    index = read_index(clip.file, policy, should_stop=should_stop)
    if index.num_frames == 0 and clip.metadata:
        clip = replace(clip, file=clip.file.without(clip.metadata))
        index = read_index(clip.file, policy, should_stop=should_stop)
    if clip.format is MediaFormat.AVI and index.num_frames <= MAX_COUNTED_FRAMES:
        index = index.counted()
    return clip, index


def _reader(clip: Clip, index: ClipIndex, *, may_seek: bool, should_stop: Callable[[], None]) -> FrameReader:
    if clip.is_av1:
        return Av1Reader(clip.file, index, may_seek=may_seek, should_stop=should_stop)
    return OpenCvReader(clip.file, index, may_seek=may_seek, should_stop=should_stop)


def _sample(
    reader: FrameReader,
    clip: Clip,
    index: ClipIndex,
    num_frames: int,
    policy: MediaPolicy,
    put: Callable[[Image.Image], None],
) -> ClipOutline:
    if not reader.is_open:
        raise EndOfClip(0)
    wanted = uniform_positions(index.num_frames, num_frames)
    size, view = reader.frame_size, reader.view
    if clip.stream is not None and clip.stream.orientation is not None:
        view = replace(view, orientation=clip.stream.orientation)
    _check_frames(size, view, len(wanted), policy)
    times_s: list[float] = []
    for position in wanted:
        frame = reader.read(position)
        if frame.size != size:
            # A stream may change its size on the way; the header's promise no longer bounds it.
            _check_frames(frame.size, view, len(wanted), policy)
            size = frame.size
        put(view.show(frame))
        times_s.append(index.times_s[reader.position])
    return ClipOutline(tuple(times_s), index.duration_s, index.frame_rate)


def _check_frames(coded: tuple[int, int], view: View, num_frames: int, policy: MediaPolicy) -> None:
    """Check the size of frames as they are shown, and as they are coded where that is larger."""
    size = view.size(coded)
    if size[0] * size[1] < coded[0] * coded[1]:
        check_size(coded, policy, policy.max_frame_pixels)
    check_size(size, policy, policy.max_frame_pixels)
    num_pixels = size[0] * size[1] * num_frames
    if num_pixels > policy.max_clip_pixels:
        raise MediaTooLarge(
            f"{num_frames} frames of {size[0]}×{size[1]} = {num_pixels} pixels, the limit is {policy.max_clip_pixels}"
        )
