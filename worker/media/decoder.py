"""`python -m worker.media.decoder`: decodes what users uploaded, in a process that may crash, hang or be taken over.

In: tasks on stdin. Out: pictures on stdout. It starts with next to no environment, gives up what it does not need
before it reads the first task, and knows no model, no queue and no storage.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import BinaryIO, Final

from PIL import Image

from worker.errors import RequestError
from worker.media.clip_index import calm_opencv
from worker.media.decoder_protocol import (
    MAX_WORDS,
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
    read_task,
)
from worker.media.image import decode_image
from worker.media.sandbox import Confinement, confine, limit_cpu_time
from worker.media.sniff import MediaKind
from worker.media.video import stream_clip

#: Pixels sent at once: a whole picture would be in memory twice, and this much stays in the processor's cache.
SENT_PIXELS: Final = 128 * 1024


def main(arguments: list[str]) -> None:
    """Serve tasks until stdin ends. The argument is a `Confinement` as JSON."""
    confinement = Confinement.model_validate_json(arguments[0])
    tasks, replies = _take_pipes()
    warnings.simplefilter("ignore")  # Pillow warns about broken metadata, which is no news here
    calm_opencv()
    confine(confinement)
    os.dup2(1, 2)  # codecs print what users upload; up to here, what is printed is for the operator
    _say(replies, Ready())
    while prefix := tasks.read(PREFIX.size):
        (num_bytes,) = PREFIX.unpack(prefix)
        task = read_task(tasks.read(num_bytes))
        limit_cpu_time(task.limit_s)
        _say(replies, _ending(task, replies))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for ourselves: a codec that prints must not be taken for a reply."""
    tasks = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return tasks, replies


def _ending(task: DecodeTask, replies: BinaryIO) -> Reply:
    try:
        return _decode(task, replies)
    except RequestError as error:
        return Refused(code=error.code, words=str(error)[:MAX_WORDS])
    except MemoryError:
        return OutOfRoom()
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - told to the worker, which logs it
        return Broken(words=f"{type(error).__name__}: {error}"[:MAX_WORDS])


def _decode(task: DecodeTask, replies: BinaryIO) -> Decoded:
    if task.kind is MediaKind.IMAGE:
        _send(replies, decode_image(task.path, task.policy).pixels)
        return Decoded()
    outline = stream_clip(
        task.path,
        task.num_frames,
        task.policy,
        put=lambda frame: _send(replies, frame),
        again=lambda: _say(replies, Again()),
        should_stop=_go_on,
    )
    return Decoded(timestamps_s=outline.timestamps_s, duration_s=outline.duration_s, fps=outline.fps)


def _send(replies: BinaryIO, picture: Image.Image) -> None:
    _say(replies, Picture(width=picture.width, height=picture.height))
    num_rows = max(1, SENT_PIXELS // picture.width)
    for top in range(0, picture.height, num_rows):
        rows = picture.crop((0, top, picture.width, min(picture.height, top + num_rows)))
        _write(replies, rows.tobytes())


def _say(replies: BinaryIO, reply: Reply) -> None:
    _write(replies, packed(reply))


def _write(replies: BinaryIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[replies.write(left) :]


def _go_on() -> None:
    """Whoever wants a decoder to stop kills it."""


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the worker is gone
        os._exit(0)
