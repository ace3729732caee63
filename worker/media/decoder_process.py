"""One decoder process, seen from the worker: start it, give it a task, take its pictures, know how it died.

In: tasks. Out: decoded media or the worker's errors. What comes back is checked against the task's own limits before
a byte of memory is set aside for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from worker.errors import DecoderOutOfMemory, MediaCorrupt, MediaTooLarge, MediaUnsupported, RequestError
from worker.media.decoder_protocol import (
    MAX_MESSAGE_BYTES,
    PIXEL_BYTES,
    PREFIX,
    Again,
    Broken,
    Decoded,
    DecodeTask,
    OutOfRoom,
    Picture,
    Ready,
    Refused,
    Reply,
    packed,
    read_reply,
)
from worker.media.sandbox import Confinement
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia, MediaPolicy

logger = logging.getLogger(__name__)

#: How long a decoder may load before it counts as broken, also on a machine that has other things to do.
START_S: Final = 60.0
POLL_S: Final = 0.1
REAP_S: Final = 10.0
PIPE_BYTES: Final = 1024 * 1024
_PACKAGES: Final = Path(__file__).parents[2]
_REFUSALS: Final[dict[str, type[RequestError]]] = {
    kind.code: kind for kind in (MediaCorrupt, MediaTooLarge, MediaUnsupported)
}


class DecoderCrashed(Exception):
    """Raised when a decoder died over a task, or said what no decoder says. `signal_name` is empty for the latter."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


class DecoderBroken(Exception):
    """Raised when the decoder's own program fails: it does not start, or has a defect."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one decoder may use: address space, and the wall-clock time of one image or clip."""

    memory_bytes: int
    image_s: float
    video_s: float

    def time_s(self, kind: MediaKind) -> float:
        """Return the time for one file."""
        return self.video_s if kind is MediaKind.VIDEO else self.image_s


class DecoderProcess:
    """A child process that decodes one task at a time. For one thread at a time; not usable after any raise but
    `RequestError`, see `is_usable`."""

    def __init__(self, limits: DecodeLimits, environment: dict[str, str]) -> None:
        """Start it, without waiting for it to load. It ends with the thread that calls this."""
        confinement = Confinement(parent=os.getpid(), memory_bytes=limits.memory_bytes)
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.media.decoder", confinement.model_dump_json()],
            env={**environment, "PYTHONPATH": str(_PACKAGES)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._replies.fileno(), False)
        with suppress(OSError):  # an unprivileged user's pipes may be small, which is slower and right
            fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._started_at = time.monotonic()
        self._is_ready = False
        self._is_cramped = False  # memory ran out once: what is left may lie in pieces
        self.num_tasks = 0
        self.is_usable = True

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; asked while it has no task."""
        return self._process.poll() is None

    def wait_ready(self, should_stop: Callable[[], None]) -> None:
        """Wait until it has loaded. Raises DecoderBroken, and whatever `should_stop` raises."""
        if self._is_ready:
            return
        self.is_usable = False
        watch = _Watch(self._started_at + START_S, should_stop)
        try:
            self._is_ready = isinstance(self._reply(watch), Ready)
        except (DecoderCrashed, TimeoutError) as error:
            raise DecoderBroken(f"a decoder process did not start ({error or 'too slow'})") from error
        if not self._is_ready:
            raise DecoderBroken("a decoder process did not start (it speaks another version)")
        self.is_usable = True

    def decode(self, task: DecodeTask, should_stop: Callable[[], None]) -> DecodedMedia:
        """Decode a file. `should_stop` raises to give the job up; it is called at least every `POLL_S`.

        Raises the RequestErrors of the decoders, MediaTooLarge when time or memory run out, DecoderOutOfMemory when the
        system ended the decoder, DecoderCrashed, DecoderBroken.
        """
        self.num_tasks += 1
        self.is_usable = False
        watch = _Watch(time.monotonic() + task.limit_s, should_stop)
        try:
            self._hand_over(task)
            media = self._take(task, watch)
        except TimeoutError as error:
            logger.warning("a decoder took too long", extra={"action": "decoder_timeout", "limit_s": task.limit_s})
            raise MediaTooLarge(f"decoding takes longer than {task.limit_s:g} s, which is the limit") from error
        except RequestError:
            self.is_usable = not self._is_cramped
            raise
        self.is_usable = True
        return media

    def kill(self) -> None:
        """End it, whatever it does, from any thread; the thread that uses it still has to close it."""
        self._process.kill()

    def close(self) -> None:
        """End it and let go of its pipes; returns when it is gone."""
        self.is_usable = False
        self.kill()
        for pipe in (self._tasks, self._replies):
            with suppress(OSError):
                pipe.close()
        self._process.wait(REAP_S)

    def _hand_over(self, task: DecodeTask) -> None:
        try:
            self._tasks.write(packed(task))
        except BrokenPipeError as error:
            death = self._death()
            if isinstance(death, TimeoutError):  # it was another file's time
                death = DecoderCrashed(signal.SIGXCPU.name)
            raise death from error

    def _take(self, task: DecodeTask, watch: _Watch) -> DecodedMedia:
        """Take replies until the task has its ending."""
        pictures: list[Image.Image] = []
        budget = _Budget(task)
        while True:
            match self._reply(watch):
                case Picture() as header:
                    budget.take(header)
                    pictures.append(self._picture(header, watch))
                case Again():
                    watch.heed_time()  # there is no end to what may come after
                    pictures.clear()
                    budget = _Budget(task, budget.num_passes + 1)
                case Decoded() as ending:
                    return _media(task, tuple(pictures), ending)
                case Refused() as refused if refused.code in _REFUSALS:
                    raise _REFUSALS[refused.code](refused.words)
                case OutOfRoom():
                    self._is_cramped = True
                    raise MediaTooLarge(
                        f"decoding needs more than {self._limits.memory_bytes} bytes of memory, which is the limit"
                    )
                case Broken() as broken:
                    raise DecoderBroken(broken.words)
                case _:
                    raise DecoderCrashed("")

    def _picture(self, header: Picture, watch: _Watch) -> Image.Image:
        pixels = self._read(header.width * header.height * PIXEL_BYTES, watch)
        return Image.frombuffer("RGB", (header.width, header.height), pixels, "raw", "RGB", 0, 1)

    def _reply(self, watch: _Watch) -> Reply:
        (num_bytes,) = PREFIX.unpack(self._read(PREFIX.size, watch))
        if num_bytes > MAX_MESSAGE_BYTES:
            raise DecoderCrashed("")
        try:
            return read_reply(bytes(self._read(num_bytes, watch)))
        except ValueError as error:
            raise DecoderCrashed("") from error

    def _read(self, num_bytes: int, watch: _Watch) -> bytearray:
        content = bytearray(num_bytes)
        left = memoryview(content)
        poll = select.poll()  # select() knows no descriptors above 1023
        poll.register(self._replies, select.POLLIN)
        while left:
            watch.heed_stop()
            if not poll.poll(0):
                # What has come counts, however late we look.
                watch.heed_time()
                poll.poll(POLL_S * 1000)
                continue
            num_read = os.readv(self._replies.fileno(), [left])
            if num_read == 0:
                raise self._death()
            left = left[num_read:]
        return content

    def _death(self) -> Exception:
        """Return what its end means: for this file, or for the machine."""
        try:
            status = self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:  # it closed its pipes and lives on
            return DecoderCrashed("")
        if status == -signal.SIGXCPU:
            return TimeoutError()
        if status == -signal.SIGKILL:
            return DecoderOutOfMemory("the system ended the process that decoded the media; memory may be short")
        return DecoderCrashed(signal.Signals(-status).name if status < 0 else f"status {status}")


@dataclass(frozen=True, slots=True)
class _Watch:
    """Until when to wait, and whether at all."""

    until: float
    should_stop: Callable[[], None]

    def heed_stop(self) -> None:
        self.should_stop()

    def heed_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError


class _Budget:
    """The pictures that a task may yet bring. A decoder keeps to it by itself, unless it is no longer itself."""

    def __init__(self, task: DecodeTask, num_passes: int = 1) -> None:
        self.num_passes = num_passes
        is_image = task.kind is MediaKind.IMAGE
        self._num_pictures = 1 if is_image else task.num_frames
        self._num_pixels = _max_pixels(task.policy, is_image=is_image)

    def take(self, picture: Picture) -> None:
        self._num_pictures -= 1
        self._num_pixels -= picture.width * picture.height
        if self._num_pictures < 0 or self._num_pixels < 0:
            raise DecoderCrashed("")


def _max_pixels(policy: MediaPolicy, *, is_image: bool) -> int:
    return policy.max_image_pixels if is_image else policy.max_clip_pixels


def _media(task: DecodeTask, pictures: tuple[Image.Image, ...], ending: Decoded) -> DecodedMedia:
    if task.kind is MediaKind.IMAGE and len(pictures) == 1:
        return DecodedImage(pictures[0])
    if task.kind is MediaKind.VIDEO and 0 < len(pictures) == len(ending.timestamps_s):
        return DecodedClip(pictures, ending.timestamps_s, ending.duration_s, ending.fps)
    raise DecoderCrashed("")
