"""One pass through a clip, forwards: decode up to each wanted frame, or seek when that decodes less.

In: a clip file and its index. Out: pictures at growing positions. OpenCV's answer to a seek is checked against the
index by the frame's time; where they disagree, the pass starts again and never seeks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import cv2
import numpy as np
from PIL import Image

from worker.media.clip_file import ClipFile
from worker.media.clip_index import STOP_CHECK_FRAMES, ClipIndex, open_capture
from worker.media.orientation import of_rotation
from worker.media.view import View

# OpenCV seeks to the key frame at or before "16 frames earlier" and decodes up to the wanted frame
# (CvCapture_FFMPEG::seek): a seek lands at least this far behind a key frame.
SEEK_LANDS_AFTER: Final = 17
# A seek flushes the decoder and fills it again; worth it only when it skips more than this.
SEEK_COSTS_FRAMES: Final = 8
_SAME_TIME_S: Final = 1e-4


class EndOfClip(Exception):
    """Raised when the clip ends before the wanted frame. `num_frames` is how many were reached."""

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.num_frames = num_frames


class ClipReader:
    """An open clip. Use as a context manager; not for more than one thread."""

    def __init__(self, file: ClipFile, index: ClipIndex, *, may_seek: bool, should_stop: Callable[[], None]) -> None:
        self._file = file
        self._index = index
        self._should_stop = should_stop
        self._num_grabs = 0
        self._capture = open_capture(file)
        self.position = -1
        self.may_seek = may_seek and bool(index.key_frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()

    @property
    def is_open(self) -> bool:
        """Whether FFmpeg has a decoder for the clip, and took it."""
        return bool(self._capture.isOpened())

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of a coded frame as the header tells them."""
        return int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))

    @property
    def view(self) -> View:
        """How FFmpeg says that frames are shown, which knows rotations and no reflections."""
        across, down = (self._capture.get(one) for one in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
        orientation = of_rotation(self._capture.get(cv2.CAP_PROP_ORIENTATION_META), then_mirrored=False)
        return View(orientation, across / down if across > 0 and down > 0 else 1.0)

    def read(self, position: int) -> Image.Image:
        """Decode the frame at `position`, which never goes back; RGB, as it is coded. Raises EndOfClip."""
        key_frame = self._index.key_frame_before(position - SEEK_LANDS_AFTER)
        if self.may_seek and key_frame is not None and key_frame > self.position + SEEK_COSTS_FRAMES:
            self._seek(key_frame, position)
        while self.position < position:
            if not self._grab():
                raise EndOfClip(self.position + 1)
        is_read, frame = self._capture.retrieve()
        if not is_read or frame is None:
            raise EndOfClip(self.position)
        return _picture(frame)

    def _grab(self) -> bool:
        """Decode the next frame without converting it."""
        if self._num_grabs % STOP_CHECK_FRAMES == 0:
            self._should_stop()
        self._num_grabs += 1
        if not self._capture.grab():
            return False
        self.position = max(self.position + 1, self._shown_position())
        return True

    def _seek(self, key_frame: int, wanted: int) -> None:
        """Land shortly after `key_frame`, at or before `wanted`; else start again and give up seeking."""
        frame_rate = self._capture.get(cv2.CAP_PROP_FPS)
        # OpenCV turns the number back into a time with this rate, so the time is what must be right.
        number = round(self._index.times_s[key_frame] * frame_rate) + SEEK_LANDS_AFTER
        self._should_stop()
        if self._capture.set(cv2.CAP_PROP_POS_FRAMES, number) and self._capture.grab():
            landed = self._shown_position()
            if key_frame <= landed <= wanted:
                self.position = landed
                return
        self._restart()

    def _restart(self) -> None:
        self._capture.release()
        self._capture = open_capture(self._file)
        self.position = -1
        self.may_seek = False

    def _shown_position(self) -> int:
        """Return the position of the frame that was grabbed last, by its time; -1 when times tell nothing."""
        if self._index.is_counted or not self._index.has_times:
            return -1
        time_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 - self._index.start_s
        return bisect_right(self._index.times_s, time_s + _SAME_TIME_S) - 1


def _picture(frame: np.ndarray) -> Image.Image:
    """Turn OpenCV's BGR into RGB inside Pillow: OpenCV would do it with a pool of threads of its own."""
    height, width = frame.shape[:2]
    return Image.frombuffer("RGB", (width, height), np.ascontiguousarray(frame), "raw", "BGR", 0, 1)
