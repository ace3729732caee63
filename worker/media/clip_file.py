"""A clip's file as FFmpeg may see it: without boxes that are in its way."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

_NOTHING: Final = b"free"  # ISO 14496-12, 8.1.2: a box that readers step over


@dataclass(frozen=True, slots=True)
class ClipFile:
    """`hidden`: where types of boxes stand that are to be read as free space."""

    path: Path
    hidden: tuple[int, ...] = ()

    def without(self, places: tuple[int, ...]) -> ClipFile:
        """Return the same file with more boxes hidden."""
        return replace(self, hidden=tuple(sorted({*self.hidden, *places})))

    def open_hiding(self) -> io.BufferedIOBase:
        """Open it for reading as if the hidden boxes were empty; nothing is written."""
        return _Hiding(self.path, self.hidden)


class _Hiding(io.BufferedIOBase):
    def __init__(self, path: Path, hidden: tuple[int, ...]) -> None:
        self._file = path.open("rb", buffering=0)
        self._hidden = hidden

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):  # FFmpeg may ask for any place, and OpenCV ends with any exception
            return -1

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._file.tell()
        content = bytearray(self._file.read(-1 if size is None else size))
        for place in self._hidden:
            first, last = max(place, start), min(place + len(_NOTHING), start + len(content))
            if first < last:
                content[first - start : last - start] = _NOTHING[first - place : last - place]
        return bytes(content)

    def close(self) -> None:
        self._file.close()
        super().close()
