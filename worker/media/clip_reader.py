"""One forward pass through a clip: decode up to each wanted frame, or seek where that decodes fewer frames.

In: a clip file and its index. Out: pictures at growing positions. After a seek the frame's time is checked against the
index; if it does not match, the pass restarts and never seeks again. AV1 is decoded by PyAV, because OpenCV's FFmpeg
has no decoder for it. PyAV is optional: its wheel carries libx264 and libx265, which are under the GPL, beside dav1d,
which decodes here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import cv2
import numpy as np
from PIL import Image

from worker.errors import MediaCorrupt
from worker.media.clip import ClipFile
from worker.media.clip_index import STOP_CHECK_FRAMES, ClipIndex, HidingCapture, open_capture
from worker.media.orientation import View, of_rotation

try:
    import av
except ImportError:
    HAS_AV1 = False
else:
    HAS_AV1 = not {"libdav1d", "libaom-av1", "libgav1"}.isdisjoint(av.codecs_available)

HOW_TO_GET_AV1: Final = "install the `av1` extra to decode it"
#: OpenCV seeks to the key frame at or before "16 frames earlier" and decodes up to the wanted frame
#: (CvCapture_FFMPEG::seek): a seek lands at least this far behind a key frame.
SEEK_LANDS_AFTER: Final = 17
#: A seek flushes the decoder and fills it again; it is worth it only when it skips more frames than this.
SEEK_COSTS_FRAMES: Final = 8
#: Times that differ by less are the same frame's: containers and decoders round differently.
_SAME_TIME_S: Final = 1e-4
#: PyAV's form of the options in `worker.media.decoders.FFMPEG_ENVIRONMENT`.
_AV_OPTIONS: Final = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}


class EndOfClip(Exception):
    """Raised when the clip ends before the wanted frame. `num_frames` is how many were decoded."""

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.num_frames = num_frames


class FrameReader(ABC):
    """An open clip. A context manager; for one thread.

    position: of the frame that was decoded last; -1 before the first one.
    may_seek: whether frames may be skipped; False once a seek landed in the wrong place.
    """

    def __init__(self, file: ClipFile, index: ClipIndex, *, may_seek: bool, should_stop: Callable[[], None]) -> None:
        self._file, self._index = file, index
        self._should_stop = should_stop
        self._num_decoded = 0
        self.position = -1
        self.may_seek = may_seek and bool(index.key_frames)
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether there is a decoder for the clip that accepted it."""

    @property
    @abstractmethod
    def frame_size(self) -> tuple[int, int]:
        """Width and height of a coded frame according to the header."""

    @property
    @abstractmethod
    def view(self) -> View:
        """How frames are to be shown, as far as the decoder's library knows."""

    @abstractmethod
    def read(self, position: int) -> Image.Image:
        """Decode the frame at `position`, which must grow from call to call; RGB, neither turned nor scaled.

        Raises EndOfClip, MediaCorrupt, and whatever `should_stop` raises.
        """

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    def _key_frame_worth_seeking(self, position: int) -> int | None:
        """Return the key frame at or before `position`, if seeking there decodes fewer frames than going on."""
        key_frame = self._index.key_frame_before(position)
        is_worth_it = key_frame is not None and key_frame > self.position + SEEK_COSTS_FRAMES
        return key_frame if self.may_seek and is_worth_it else None

    def _count_frame(self) -> None:
        if self._num_decoded % STOP_CHECK_FRAMES == 0:
            self._should_stop()
        self._num_decoded += 1

    def _restart_without_seeking(self) -> None:
        self._close()
        self._open()
        self.position = -1
        self.may_seek = False

    def _position_at(self, time_s: float) -> int:
        """Return the position of the frame shown at `time_s`, counted from the first frame's time."""
        return bisect_right(self._index.times_s, time_s + _SAME_TIME_S) - 1


class OpenCvReader(FrameReader):
    """Decodes with the FFmpeg in OpenCV's wheel."""

    _capture: cv2.VideoCapture | HidingCapture

    @property
    def is_open(self) -> bool:
        return bool(self._capture.isOpened())

    @property
    def frame_size(self) -> tuple[int, int]:
        return int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))

    @property
    def view(self) -> View:
        """Rotation and pixel aspect; OpenCV reports no reflections."""
        across, down = (self._capture.get(one) for one in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
        orientation = of_rotation(self._capture.get(cv2.CAP_PROP_ORIENTATION_META), then_mirrored=False)
        return View(orientation, across / down if across > 0 and down > 0 else 1.0)

    def read(self, position: int) -> Image.Image:
        key_frame = self._key_frame_worth_seeking(position - SEEK_LANDS_AFTER)
        if key_frame is not None:
            self._seek(key_frame, position)
        while self.position < position:
            if not self._grab():
                raise EndOfClip(self.position + 1)
        is_read, frame = self._capture.retrieve()
        if not is_read or frame is None:
            raise EndOfClip(self.position)
        return _picture(frame)

    def _open(self) -> None:
        self._capture = open_capture(self._file)

    def _close(self) -> None:
        self._capture.release()

    def _grab(self) -> bool:
        """Decode the next frame without converting it."""
        self._count_frame()
        if not self._capture.grab():
            return False
        self.position = max(self.position + 1, self._shown_position())
        return True

    def _seek(self, key_frame: int, wanted: int) -> None:
        """Land shortly after `key_frame`, at or before `wanted`; else restart without seeking."""
        frame_rate = self._capture.get(cv2.CAP_PROP_FPS)
        # OpenCV turns the number back into a time with this rate, so the time is what must be right.
        number = round(self._index.times_s[key_frame] * frame_rate) + SEEK_LANDS_AFTER
        self._should_stop()
        if self._capture.set(cv2.CAP_PROP_POS_FRAMES, number) and self._capture.grab():
            landed = self._shown_position()
            if key_frame <= landed <= wanted:
                self.position = landed
                return
        self._restart_without_seeking()

    def _shown_position(self) -> int:
        """Return the position of the frame that was decoded last, by its time; -1 when the index has no usable
        times.
        """
        if self._index.is_counted or not self._index.has_times:
            return -1
        return self._position_at(self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 - self._index.start_s)


class Av1Reader(FrameReader):
    """Decodes with PyAV. Raises MediaCorrupt for a clip that cannot be opened."""

    @property
    def is_open(self) -> bool:
        """Always: `_open` raises otherwise."""
        return True

    @property
    def frame_size(self) -> tuple[int, int]:
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def view(self) -> View:
        """The pixel aspect only; the container's display matrix is read from its tables."""
        aspect = self._stream.sample_aspect_ratio
        return View(pixel_aspect=float(aspect) if aspect else 1.0)

    def read(self, position: int) -> Image.Image:
        frame: av.VideoFrame | None = None
        key_frame = self._key_frame_worth_seeking(position)
        if key_frame is not None:
            frame = self._seek(key_frame, position)
        while self.position < position:
            frame = self._next()
        assert frame is not None, "positions grow"
        try:
            return Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
        except av.FFmpegError as error:
            raise EndOfClip(self.position) from error

    def _open(self) -> None:
        source = self._file.open_hiding() if self._file.hidden else str(self._file.path)
        try:
            self._container = av.open(source, "r", options=_AV_OPTIONS, metadata_errors="ignore")
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise MediaCorrupt(f"the video cannot be decoded ({type(error).__name__})") from error
        self._stream.codec_context.thread_count = 1  # dav1d starts no thread then
        self._frames = self._container.decode(self._stream)

    def _close(self) -> None:
        self._container.close()

    def _next(self) -> av.VideoFrame:
        """Decode the next frame."""
        self._count_frame()
        try:
            frame: av.VideoFrame | None = next(self._frames, None)
        except av.FFmpegError as error:
            raise EndOfClip(self.position + 1) from error
        if frame is None:
            raise EndOfClip(self.position + 1)
        self.position = max(self.position + 1, self._shown_position(frame))
        return frame

    def _seek(self, key_frame: int, wanted: int) -> av.VideoFrame | None:
        """Land on `key_frame`, or at least at or before `wanted`; else restart without seeking."""
        time_s = self._index.times_s[key_frame] + self._index.start_s
        start = self._stream.start_time or 0
        self._should_stop()
        try:
            self._container.seek(start + round(time_s / float(self._stream.time_base or 1)), stream=self._stream)
            self._frames = self._container.decode(self._stream)
            frame = next(self._frames, None)
        except av.FFmpegError:
            frame = None
        landed = -1 if frame is None else self._shown_position(frame)
        if key_frame <= landed <= wanted:
            self.position = landed
            return frame
        self._restart_without_seeking()
        return None

    def _shown_position(self, frame: av.VideoFrame) -> int:
        """Return a frame's position, by its time; -1 when the index or the frame has no usable time."""
        if not self._index.has_times or frame.pts is None or frame.time_base is None:
            return -1
        time_s = float((frame.pts - (self._stream.start_time or 0)) * frame.time_base)
        return self._position_at(time_s - self._index.start_s)


def _picture(frame: np.ndarray) -> Image.Image:
    """Convert OpenCV's BGR to RGB inside Pillow: OpenCV would use a thread pool of its own."""
    height, width = frame.shape[:2]
    return Image.frombuffer("RGB", (width, height), np.ascontiguousarray(frame), "raw", "BGR", 0, 1)
