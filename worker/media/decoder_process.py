"""One decoder process, seen from the worker: start it, send it tasks, receive pictures, interpret its exit status.

In: tasks. Out: decoded media or the worker's errors. Replies are checked against the task's limits before any memory is
allocated for them.
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
    Broken,
    Decoded,
    DecodeTask,
    MemoryExhausted,
    PictureHeader,
    Ready,
    Refused,
    Reply,
    Restarted,
    encode,
    read_reply,
)
from worker.media.sandbox import Confinement
from worker.media.sniff import MediaKind
from worker.media.types import DecodedClip, DecodedImage, DecodedMedia, MediaPolicy

logger = logging.getLogger(__name__)

#: How long a decoder may take to load before it counts as broken; generous, for a busy machine.
START_S: Final = 60.0
POLL_S: Final = 0.1
REAP_S: Final = 10.0
PIPE_BYTES: Final = 1024 * 1024
_PACKAGES: Final = Path(__file__).parents[2]
_REFUSALS: Final[dict[str, type[RequestError]]] = {
    kind.code: kind for kind in (MediaCorrupt, MediaTooLarge, MediaUnsupported)
}


class DecoderCrashed(Exception):
    """Raised when a decoder died during a task, or sent an invalid reply (then `signal_name` is empty)."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


class DecoderBroken(Exception):
    """Raised when the decoder's own program fails: it does not start, or has a bug."""


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
    """A child process that decodes one task at a time. For one thread at a time.

    is_usable: whether it may get another task; False after any exception but a RequestError.
    """

    def __init__(self, limits: DecodeLimits, environment: dict[str, str]) -> None:
        """Start it, without waiting for it to load. Linux ends it with the thread that calls this."""
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
        with suppress(OSError):  # an unprivileged user's pipes may be limited; small ones are slower only
            fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._started_at = time.monotonic()
        self._is_ready = False
        self._ran_out_of_memory = False  # then its address space may be fragmented, and it gets no further task
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
        limits = _WaitLimits(self._started_at + START_S, should_stop)
        try:
            self._is_ready = isinstance(self._reply(limits), Ready)
        except (DecoderCrashed, TimeoutError) as error:
            reason = "too slow" if isinstance(error, TimeoutError) else str(error) or "it ended"
            raise DecoderBroken(f"a decoder process did not start ({reason})") from error
        if not self._is_ready:
            raise DecoderBroken("a decoder process did not start (unexpected first message)")
        self.is_usable = True

    def decode(self, task: DecodeTask, should_stop: Callable[[], None]) -> DecodedMedia:
        """Decode a file. `should_stop` raises to abort; it is called at least every `POLL_S`.

        Raises the RequestErrors of the decoders, MediaTooLarge when time or memory run out, DecoderOutOfMemory when the
        system ended the decoder, DecoderCrashed, DecoderBroken.
        """
        self.num_tasks += 1
        self.is_usable = False
        limits = _WaitLimits(time.monotonic() + task.limit_s, should_stop)
        try:
            self._send(task)
            media = self._receive(task, limits)
        except TimeoutError as error:
            logger.warning("a decoder took too long", extra={"action": "decoder_timeout", "limit_s": task.limit_s})
            raise MediaTooLarge(f"decoding takes longer than {task.limit_s:g} s, which is the limit") from error
        except RequestError:
            self.is_usable = not self._ran_out_of_memory
            raise
        self.is_usable = True
        return media

    def kill(self) -> None:
        """Kill it, from any thread; the thread that uses it still has to close it."""
        self._process.kill()

    def close(self) -> None:
        """Kill it, close its pipes and wait until it has ended."""
        self.is_usable = False
        self.kill()
        for pipe in (self._tasks, self._replies):
            with suppress(OSError):
                pipe.close()
        self._process.wait(REAP_S)

    def _send(self, task: DecodeTask) -> None:
        try:
            self._tasks.write(encode(task))
        except BrokenPipeError as error:
            exit_error = self._exit_error()
            if isinstance(exit_error, TimeoutError):  # the CPU time of an earlier task ran out
                exit_error = DecoderCrashed(signal.SIGXCPU.name)
            raise exit_error from error

    def _receive(self, task: DecodeTask, limits: _WaitLimits) -> DecodedMedia:
        """Receive replies up to the task's final one."""
        pictures: list[Image.Image] = []
        quota = _Quota(task)
        while True:
            match self._reply(limits):
                case PictureHeader() as header:
                    quota.charge(header)
                    pictures.append(self._picture(header, limits))
                case Restarted():
                    limits.check_time()  # a hostile decoder may restart for ever
                    pictures.clear()
                    quota = _Quota(task, quota.num_passes + 1)
                case Decoded() as decoded:
                    return _media(task, tuple(pictures), decoded)
                case Refused() as refused if refused.code in _REFUSALS:
                    raise _REFUSALS[refused.code](refused.message)
                case MemoryExhausted():
                    self._ran_out_of_memory = True
                    raise MediaTooLarge(
                        f"decoding needs more than {self._limits.memory_bytes} bytes of memory, which is the limit"
                    )
                case Broken() as broken:
                    raise DecoderBroken(broken.message)
                case _:
                    raise DecoderCrashed("")

    def _picture(self, header: PictureHeader, limits: _WaitLimits) -> Image.Image:
        pixels = self._read(header.width * header.height * PIXEL_BYTES, limits)
        return Image.frombuffer("RGB", (header.width, header.height), pixels, "raw", "RGB", 0, 1)

    def _reply(self, limits: _WaitLimits) -> Reply:
        (num_bytes,) = PREFIX.unpack(self._read(PREFIX.size, limits))
        if num_bytes > MAX_MESSAGE_BYTES:
            raise DecoderCrashed("")
        try:
            return read_reply(bytes(self._read(num_bytes, limits)))
        except ValueError as error:
            raise DecoderCrashed("") from error

    def _read(self, num_bytes: int, limits: _WaitLimits) -> bytearray:
        content = bytearray(num_bytes)
        left = memoryview(content)
        poll = select.poll()  # select() knows no descriptors above 1023
        poll.register(self._replies, select.POLLIN)
        while left:
            limits.check_stop()
            if not poll.poll(0):
                # The time counts only while there is nothing to read: this thread may be late itself.
                limits.check_time()
                poll.poll(POLL_S * 1000)
                continue
            num_read = os.readv(self._replies.fileno(), [left])
            if num_read == 0:
                raise self._exit_error()
            left = left[num_read:]
        return content

    def _exit_error(self) -> Exception:
        """Return the exception for its exit status."""
        try:
            status = self._process.wait(REAP_S)
        except subprocess.TimeoutExpired:  # it closed its pipes and is still running
            return DecoderCrashed("")
        if status == -signal.SIGXCPU:
            return TimeoutError()
        if status == -signal.SIGKILL:
            return DecoderOutOfMemory("the system ended the process that decoded the media; memory may be short")
        return DecoderCrashed(signal.Signals(-status).name if status < 0 else f"status {status}")


@dataclass(frozen=True, slots=True)
class _WaitLimits:
    """The deadline of a wait, and the job's own reason to stop."""

    until: float
    should_stop: Callable[[], None]

    def check_stop(self) -> None:
        self.should_stop()

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError


class _Quota:
    """The pictures and pixels that a task may still return. Only a decoder that was taken over exceeds it."""

    def __init__(self, task: DecodeTask, num_passes: int = 1) -> None:
        self.num_passes = num_passes
        is_image = task.kind is MediaKind.IMAGE
        self._num_pictures = 1 if is_image else task.num_frames
        self._num_pixels = _max_pixels(task.policy, is_image=is_image)

    def charge(self, picture: PictureHeader) -> None:
        self._num_pictures -= 1
        self._num_pixels -= picture.width * picture.height
        if self._num_pictures < 0 or self._num_pixels < 0:
            raise DecoderCrashed("")


def _max_pixels(policy: MediaPolicy, *, is_image: bool) -> int:
    return policy.max_image_pixels if is_image else policy.max_clip_pixels


def _media(task: DecodeTask, pictures: tuple[Image.Image, ...], decoded: Decoded) -> DecodedMedia:
    if task.kind is MediaKind.IMAGE and len(pictures) == 1:
        return DecodedImage(pictures[0])
    if task.kind is MediaKind.VIDEO and 0 < len(pictures) == len(decoded.timestamps_s):
        return DecodedClip(pictures, decoded.timestamps_s, decoded.duration_s, decoded.fps)
    raise DecoderCrashed("")
