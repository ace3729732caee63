"""The index of a clip: the times of its frames and its key frames, read from its packets without decoding.

In: a clip file. Out: a `ClipIndex`. The container's own frame count is not used: it is missing, rounded or wrong in
many files.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import cv2

from worker.errors import MediaTooLarge
from worker.media.clip import ClipFile
from worker.media.types import MediaPolicy

#: Frames between two calls of `should_stop`.
STOP_CHECK_FRAMES: Final = 32
_RAW: Final = (cv2.CAP_PROP_FORMAT, -1)
# One thread per capture: many jobs decode at once, and FFmpeg would start a thread per core for each of them.
_THREADS: Final = (cv2.CAP_PROP_N_THREADS, 1)


@dataclass(frozen=True, slots=True)
class ClipIndex:
    """Frames in the order in which they are shown.

    times_s: time of each frame from the first one, growing; all 0 when the container gives no usable times.
    start_s: the container's time of the first frame.
    key_frames: positions from which decoding can start, growing; empty when seeking is not safe.
    frame_rate: frames per second on the average; 0 when unknown.
    is_counted: a decoded frame's position is the number of frames before it, not found by its time; there is no
    seeking.
    """

    times_s: tuple[float, ...]
    start_s: float
    key_frames: tuple[int, ...]
    frame_rate: float
    is_counted: bool = False

    @property
    def num_frames(self) -> int:
        """Frames that the file holds."""
        return len(self.times_s)

    @property
    def duration_s(self) -> float:
        """Length of the clip, the last frame's own time included; 0 when unknown."""
        return self.num_frames / self.frame_rate if self.frame_rate else 0.0

    @property
    def has_times(self) -> bool:
        """Whether frames have distinct times."""
        return self.num_frames < 2 or self.times_s[-1] > 0

    def counted(self) -> ClipIndex:
        """Return the index for a container whose times are decoding times, not presentation times."""
        return replace(self, key_frames=(), is_counted=True)

    def first(self, num_frames: int) -> ClipIndex:
        """Return the index of a clip that ends after `num_frames` frames."""
        key_frames = tuple(position for position in self.key_frames if position < num_frames)
        return replace(self, times_s=self.times_s[:num_frames], key_frames=key_frames)

    def key_frame_before(self, position: int) -> int | None:
        """Return the last key frame at or before `position`, if seeking is safe and there is one."""
        found = bisect_left(self.key_frames, position + 1)
        return self.key_frames[found - 1] if found else None


def configure_opencv() -> None:
    """Turn off OpenCV's thread pool and its messages on stderr. Called once per decoder process."""
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class HidingCapture:
    """A capture that reads from a Python file and keeps a reference to it: OpenCV drops its own without holding the
    interpreter's lock, so it must not be the last one. (cv2.VideoCapture cannot be subclassed.)
    """

    def __init__(self, source: Any, properties: Sequence[int]) -> None:
        """OpenCV's stubs name a class of C++ for `source`; the binding takes any io.BufferedIOBase."""
        self._source = source
        self._capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, properties)
        self.get, self.set = self._capture.get, self._capture.set
        self.grab, self.retrieve = self._capture.grab, self._capture.retrieve
        self.isOpened = self._capture.isOpened

    def release(self) -> None:
        """Close the clip, then the file."""
        self._capture.release()
        self._source.close()


def open_capture(file: ClipFile, *, is_raw: bool = False) -> cv2.VideoCapture | HidingCapture:
    """Open a clip with FFmpeg only; `is_raw` reads packets instead of pictures. The caller releases it.

    Pictures are not turned to their orientation. OpenCV's other back ends are never tried: one of them reads numbered
    image files by a pattern in the name.
    """
    properties = [*_THREADS, *(_RAW if is_raw else ())]
    capture: cv2.VideoCapture | HidingCapture
    if file.hidden:
        capture = HidingCapture(file.open_hiding(), properties)
    else:
        capture = cv2.VideoCapture(str(file.path), cv2.CAP_FFMPEG, properties)
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)  # OpenCV confuses mirrored with rotated
    return capture


def read_index(file: ClipFile, policy: MediaPolicy, *, should_stop: Callable[[], None]) -> ClipIndex:
    """Index a clip in one pass over its packets, which costs its reading and no decoding.

    Returns an index of no frames for a file without a readable picture stream.
    Raises MediaTooLarge as soon as frames or seconds exceed the policy, and whatever `should_stop` raises.
    """
    capture = open_capture(file, is_raw=True)
    times_ms: list[float] = []
    key_times_ms: list[float] = []
    try:
        frame_rate = capture.get(cv2.CAP_PROP_FPS)
        while capture.grab():
            if len(times_ms) % STOP_CHECK_FRAMES == 0:
                should_stop()
            time_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
            times_ms.append(time_ms)
            if capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME):
                key_times_ms.append(time_ms)
            _check_length(len(times_ms), (time_ms - times_ms[0]) / 1000, policy)
    finally:
        capture.release()
    return _build(times_ms, key_times_ms, frame_rate)


def _check_length(num_frames: int, seconds: float, policy: MediaPolicy) -> None:
    if num_frames > policy.max_video_frames:
        raise MediaTooLarge(f"the video has over {policy.max_video_frames} frames, which is the limit")
    if seconds > policy.max_video_seconds:
        raise MediaTooLarge(f"the video lasts over {seconds:.1f} s, the limit is {policy.max_video_seconds:g} s")


def _build(times_ms: Sequence[float], key_times_ms: Sequence[float], claimed_rate: float) -> ClipIndex:
    """Sort packets, which come in decoding order, into presentation order."""
    shown_ms = sorted(times_ms)
    num_frames = len(shown_ms)
    has_times = all(map(math.isfinite, shown_ms)) and all(early < late for early, late in pairwise(shown_ms))
    if not has_times:
        rate = claimed_rate if math.isfinite(claimed_rate) and claimed_rate > 0 else 0.0
        return ClipIndex((0.0,) * num_frames, 0.0, (), rate)
    start_s = shown_ms[0] / 1000 if shown_ms else 0.0
    times_s = tuple((time_ms - shown_ms[0]) / 1000 for time_ms in shown_ms)
    key_frames = tuple(sorted(bisect_left(shown_ms, time_ms) for time_ms in key_times_ms))
    rate = (num_frames - 1) / times_s[-1] if num_frames > 1 else claimed_rate
    return ClipIndex(times_s, start_s, key_frames, rate if math.isfinite(rate) and rate > 0 else 0.0)
