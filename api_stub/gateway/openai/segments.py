"""What a batch has written so far: small objects in S3, put together into one file in the end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO, Final, cast

from api_stub.gateway.gateway import Gateway
from api_stub.gateway.openai.files import CONTENT_TYPE
from api_stub.storage import Storage

#: A segment ends with the line that reaches one of these.
MAX_LINES: Final = 256
MAX_BYTES: Final = 4 * 1024 * 1024
_WHOLE: Final = 1 << 32


class Joined(io.RawIOBase):
    """Segments as one file to read, one of them in memory at a time. Blocks."""

    def __init__(self, storage: Storage, uris: Sequence[str]) -> None:
        self._storage, self._left = storage, list(uris)
        self._open: io.BytesIO = io.BytesIO()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read exactly `size` bytes, less at the end, all for -1."""
        pieces: list[bytes] = []
        wanted = size if size >= 0 else _WHOLE
        while wanted > 0:
            piece = self._open.read(wanted)
            if piece:
                pieces.append(piece)
                wanted -= len(piece)
            elif self._left:
                self._open = io.BytesIO(self._storage.read(self._left.pop(0), 0, _WHOLE))
            else:
                break
        read = b"".join(pieces)
        self.num_bytes += len(read)
        return read


async def put_segment(gateway: Gateway, uri: str, lines: Sequence[bytes]) -> None:
    """Store one segment."""
    body = io.BytesIO(b"".join(lines))
    await gateway.in_storage(lambda: gateway.storage.put(uri, body, CONTENT_TYPE))


async def join(gateway: Gateway, uris: Sequence[str], target: str) -> int:
    """Store all segments as one object, by a multipart upload, and return its size."""
    joined = Joined(gateway.storage, uris)
    await gateway.in_storage(lambda: gateway.storage.put(target, cast("BinaryIO", joined), CONTENT_TYPE))
    return joined.num_bytes


async def delete_segments(gateway: Gateway, uris: Sequence[str]) -> None:
    """Delete segments that are not needed any more."""
    for uri in uris:
        await gateway.in_storage(lambda uri=uri: gateway.storage.delete(uri))  # type: ignore[misc]
