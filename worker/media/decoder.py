"""`python -m worker.media.decoder`: a sandboxed process that decodes uploaded files. It may crash or be taken over.

In: tasks on stdin. Out: pictures on stdout. It gets almost no environment and enters its sandbox before it reads the
first task. It knows no model, no queue and no storage.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import BinaryIO, Final

from PIL import Image

from worker.errors import RequestError
from worker.media.clip_index import configure_opencv
from worker.media.decoder_protocol import (
    MAX_MESSAGE_CHARS,
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
    read_task,
)
from worker.media.image import decode_image
from worker.media.sandbox import Confinement, confine, limit_cpu_time
from worker.media.sniff import MediaKind
from worker.media.video import stream_clip

#: Pixels sent at once. A whole picture would be in memory twice; this much stays in the processor's cache.
SENT_PIXELS: Final = 128 * 1024


def main(arguments: list[str]) -> None:
    """Serve tasks until stdin ends. The argument is a `Confinement` as JSON."""
    confinement = Confinement.model_validate_json(arguments[0])
    tasks, replies = _redirect_pipes()
    warnings.simplefilter("ignore")  # Pillow warns about broken metadata
    configure_opencv()
    confine(confinement)
    os.dup2(1, 2)  # codecs may print users' content; the output up to here is for the operator
    _send(replies, Ready())
    while prefix := tasks.read(PREFIX.size):
        (num_bytes,) = PREFIX.unpack(prefix)
        task = read_task(tasks.read(num_bytes))
        limit_cpu_time(task.limit_s)
        _send(replies, _final_reply(task, replies))


def _redirect_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return stdin and stdout, and redirect both to /dev/null, so that a codec's output is not taken for a reply."""
    tasks = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return tasks, replies


def _final_reply(task: DecodeTask, replies: BinaryIO) -> Reply:
    try:
        return _decode(task, replies)
    except RequestError as error:
        return Refused(code=error.code, message=str(error)[:MAX_MESSAGE_CHARS])
    except MemoryError:
        return MemoryExhausted()
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - reported to the worker, which logs it
        return Broken(message=f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS])


def _decode(task: DecodeTask, replies: BinaryIO) -> Decoded:
    if task.kind is MediaKind.IMAGE:
        _send_picture(replies, decode_image(task.path, task.policy).pixels)
        return Decoded()
    outline = stream_clip(
        task.path,
        task.num_frames,
        task.policy,
        put=lambda frame: _send_picture(replies, frame),
        restart=lambda: _send(replies, Restarted()),
        should_stop=_never_stop,
    )
    return Decoded(timestamps_s=outline.timestamps_s, duration_s=outline.duration_s, fps=outline.fps)


def _send_picture(replies: BinaryIO, picture: Image.Image) -> None:
    _send(replies, PictureHeader(width=picture.width, height=picture.height))
    num_rows = max(1, SENT_PIXELS // picture.width)
    for top in range(0, picture.height, num_rows):
        rows = picture.crop((0, top, picture.width, min(picture.height, top + num_rows)))
        _write(replies, rows.tobytes())


def _send(replies: BinaryIO, reply: Reply) -> None:
    _write(replies, encode(reply))


def _write(replies: BinaryIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[replies.write(left) :]


def _never_stop() -> None:
    """Nothing stops a task: the worker kills the process instead."""


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the worker is gone
        os._exit(0)
