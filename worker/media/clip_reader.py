"""One pass through a clip, forwards: decode up to each wanted frame, or seek when that decodes less.

In: a clip file and its index. Out: pictures at growing positions. OpenCV's answer to a seek is checked against the
index by the frame's time; where they disagree, the pass starts again and never seeks. AV1 goes through PyAV, because
OpenCV's FFmpeg decodes none. PyAV is optional: its wheel carries libx264 and libx265, which are under the GPL, beside
dav1d, which decodes here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import cv2
import numpy as np
from PIL import Image

from worker.errors import MediaCorrupt
from worker.media.clip import ClipFile
from worker.media.clip_index import STOP_CHECK_FRAMES, ClipIndex, open_capture
from worker.media.orientation import View, of_rotation

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


try:
    import av
except ImportError:
    HAS_AV1 = False
else:
    HAS_AV1 = not {"libdav1d", "libaom-av1", "libgav1"}.isdisjoint(av.codecs_available)

HOW_TO_GET_AV1: Final = "install the `av1` extra to decode it"
_AV1_SAME_TIME_S: Final = 1e-4
#: `decoders` tells OpenCV the same.
_OPTIONS: Final = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}


class Av1Reader:
    """An open clip. Use as a context manager; not for more than one thread."""

    def __init__(self, file: ClipFile, index: ClipIndex, *, may_seek: bool, should_stop: Callable[[], None]) -> None:
        self._file, self._index = file, index
        self._should_stop = should_stop
        self._num_decoded = 0
        self._open()
        self.position = -1
        self.may_seek = may_seek and bool(index.key_frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def is_open(self) -> bool:
        """Always: one that does not open is refused at once."""
        return True

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of a coded frame as the header tells them."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def view(self) -> View:
        """How frames are shown, but for the container's matrix."""
        aspect = self._stream.sample_aspect_ratio
        return View(pixel_aspect=float(aspect) if aspect else 1.0)

    def read(self, position: int) -> Image.Image:
        """Decode the frame at `position`, which never goes back; RGB, as it is coded.

        Raises EndOfClip, MediaCorrupt.
        """
        frame: av.VideoFrame | None = None
        key_frame = self._index.key_frame_before(position)
        if self.may_seek and key_frame is not None and key_frame > self.position + SEEK_COSTS_FRAMES:
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
            self._container = av.open(source, "r", options=_OPTIONS, metadata_errors="ignore")
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise MediaCorrupt(f"the video cannot be decoded ({type(error).__name__})") from error
        self._stream.codec_context.thread_count = 1  # dav1d starts no thread then
        self._frames = self._container.decode(self._stream)

    def _next(self) -> av.VideoFrame:
        """Decode the next frame."""
        if self._num_decoded % STOP_CHECK_FRAMES == 0:
            self._should_stop()
        self._num_decoded += 1
        try:
            frame: av.VideoFrame | None = next(self._frames, None)
        except av.FFmpegError as error:
            raise EndOfClip(self.position + 1) from error
        if frame is None:
            raise EndOfClip(self.position + 1)
        self.position = max(self.position + 1, self._shown_position(frame))
        return frame

    def _seek(self, key_frame: int, wanted: int) -> av.VideoFrame | None:
        """Land on `key_frame`, or at least at or before `wanted`; else start again and give up seeking."""
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
        self._container.close()
        self._open()
        self.position = -1
        self.may_seek = False
        return None

    def _shown_position(self, frame: av.VideoFrame) -> int:
        """Return a frame's position, by its time; -1 when times tell nothing."""
        if not self._index.has_times or frame.pts is None or frame.time_base is None:
            return -1
        time_s = float((frame.pts - (self._stream.start_time or 0)) * frame.time_base) - self._index.start_s
        return bisect_right(self._index.times_s, time_s + _AV1_SAME_TIME_S) - 1
