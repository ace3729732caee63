"""The pool of a worker's decoder processes: bounded in number, started when needed, replaced when they die.

In: a file and its kind. Out: a decoded medium, or an error with a code. A crash, an endless loop or excessive memory
use of a codec does not affect the process that holds the model.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from worker.errors import CannotStart, DecoderFailed, DecoderOutOfMemory, MediaCorrupt
from worker.media.decoder_process import POLL_S, DecodeLimits, DecoderBroken, DecoderCrashed, DecoderProcess
from worker.media.decoder_protocol import DecodeTask
from worker.media.sniff import MediaKind
from worker.media.types import DecodedMedia, MediaPolicy

logger = logging.getLogger(__name__)

#: A decoder is replaced after this many files, which bounds what its codecs leak.
MAX_TASKS: Final = 500
#: The variables that a decoder inherits: no credentials, no addresses.
_INHERITED: Final = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
#: FFmpeg's options, which OpenCV reads from the environment only. A second defence after `sniff`: FFmpeg itself would
#: open playlists and concat lists. Also silences FFmpeg on stderr.
FFMPEG_ENVIRONMENT: Final = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": (
        "protocol_whitelist;file|format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
    ),
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
}
_ENVIRONMENT: Final = {
    **FFMPEG_ENVIRONMENT,
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Decoders:
    """Shared by all jobs of a worker; every method may be called from any thread."""

    def __init__(self, num_processes: int, limits: DecodeLimits) -> None:
        self.limits = limits
        self.num_processes = num_processes
        self._permits = threading.Semaphore(num_processes)
        self._lock = threading.Lock()
        self._idle: list[DecoderProcess] = []  # the one used last is taken first: its caches are warm
        self._busy: set[DecoderProcess] = set()
        self._is_closed = False
        # Linux ends a decoder with the thread that started it, so this thread lives as long as the worker.
        self._starter = ThreadPoolExecutor(1, "decoder-starter")

    def start(self) -> None:
        """Start one decoder, so that the first job finds it loaded. Does not wait for it."""
        self._put_back(self._new())

    def wait_ready(self) -> None:
        """Wait until a decoder has loaded. Raises CannotStart when none can."""
        try:
            with self._borrow(_never_stop, fresh=False) as decoder:
                decoder.wait_ready(_never_stop)
        except (DecoderBroken, DecoderOutOfMemory) as error:
            raise CannotStart(f"media cannot be decoded: {error}") from error

    def decode(
        self,
        path: Path,
        kind: MediaKind,
        num_frames: int,
        policy: MediaPolicy,
        *,
        should_stop: Callable[[], None],
    ) -> DecodedMedia:
        """Decode the file at `path`; `num_frames` counts for clips.

        Waits for a free decoder without a limit. `should_stop` is called at least every `POLL_S` and raises to abort.

        Raises MediaUnsupported, MediaTooLarge (also for time and memory), MediaCorrupt (also for a file that crashes
        a decoder), DecoderOutOfMemory, DecoderFailed.
        """
        task = DecodeTask(
            path=path,
            kind=kind,
            num_frames=num_frames,
            limit_s=self.limits.time_s(kind),
            policy=replace(policy, buckets=frozenset()),
        )
        try:
            return self._decode(task, should_stop)
        except DecoderCrashed:
            pass  # an earlier file may have corrupted the decoder: only a crash of a fresh one is this file's fault
        except DecoderBroken as error:
            raise _failed(error) from error
        try:
            return self._decode(task, should_stop, fresh=True)
        except DecoderCrashed as crash:
            raise MediaCorrupt(f"it crashes the decoder ({crash.signal_name or 'wrong reply'})") from crash
        except DecoderBroken as error:
            raise _failed(error) from error

    def close(self) -> None:
        """End all decoders, also those that are decoding."""
        with self._lock:
            self._is_closed = True
            idle, self._idle, busy = self._idle, [], list(self._busy)
        for decoder in idle:
            decoder.close()
        for decoder in busy:
            decoder.kill()
        self._starter.shutdown()

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run now."""
        with self._lock:
            return [decoder.pid for decoder in (*self._idle, *self._busy)]

    def _decode(self, task: DecodeTask, should_stop: Callable[[], None], *, fresh: bool = False) -> DecodedMedia:
        with self._borrow(should_stop, fresh=fresh) as decoder:
            decoder.wait_ready(should_stop)
            try:
                return decoder.decode(task, should_stop)
            except DecoderCrashed as crash:
                facts = {"action": "decoder_crashed", "signal": crash.signal_name, "num_tasks": decoder.num_tasks}
                logger.warning("a decoder crashed", extra=facts)
                raise

    @contextmanager
    def _borrow(self, should_stop: Callable[[], None], *, fresh: bool) -> Iterator[DecoderProcess]:
        while not self._permits.acquire(timeout=POLL_S):
            should_stop()
        try:
            decoder = self._fresh() if fresh else self._any()
            try:
                yield decoder
            finally:
                self._put_back(decoder)
        finally:
            self._permits.release()

    def _any(self) -> DecoderProcess:
        while (decoder := self._pop_idle()) is not None:
            if decoder.is_alive:
                with self._lock:
                    self._busy.add(decoder)
                return decoder
            decoder.close()
        return self._new()

    def _fresh(self) -> DecoderProcess:
        if (replaced := self._pop_idle()) is not None:
            replaced.close()
        return self._new()

    def _pop_idle(self) -> DecoderProcess | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _new(self) -> DecoderProcess:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _ENVIRONMENT
        try:
            decoder = self._starter.submit(DecoderProcess, self.limits, environment).result()
        except OSError as error:
            raise DecoderOutOfMemory(f"no process to decode media can be started ({error.strerror})") from error
        with self._lock:
            self._busy.add(decoder)
            is_closed = self._is_closed
        if is_closed:
            decoder.kill()
        return decoder

    def _put_back(self, decoder: DecoderProcess) -> None:
        with self._lock:
            self._busy.discard(decoder)
            is_kept = decoder.is_usable and decoder.num_tasks < MAX_TASKS and not self._is_closed
            if is_kept:
                self._idle.append(decoder)
        if not is_kept:
            decoder.close()


def _failed(error: DecoderBroken) -> DecoderFailed:
    """Log the decoder's message, which may quote the file, and return an error without it."""
    logger.error("decoder program failed", extra={"action": "decoder_broken", "error": str(error)})
    return DecoderFailed("the decoder's own program failed; the worker's log has the details")


def _never_stop() -> None:
    """At boot there is no job to abort."""
