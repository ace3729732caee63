"""Inflates what a producer has compressed, up to a limit: a small message may stand for gigabytes.

The names are kombu's (kombu/compression.py); those of its methods that Python itself can read.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Mapping
from typing import Final, Protocol

#: What a decoder may take beside its output: lzma's strongest setting needs 65 MiB.
_LZMA_BYTES: Final = 80 * 1024 * 1024
#: zlib tells its own format and gzip's apart.
_ZLIB_OR_GZIP: Final = zlib.MAX_WBITS | 32


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_METHODS: Final[Mapping[str, str]] = {
    "application/x-gzip": "gzip", "gzip": "gzip", "zlib": "gzip",
    "application/x-bz2": "bzip2", "bzip2": "bzip2", "bzip": "bzip2",
    "application/x-lzma": "lzma", "lzma": "lzma", "xz": "lzma",
}  # fmt: skip


def inflate(packed: bytes, method: str, max_bytes: int) -> bytes:
    """Return at most `max_bytes` inflated bytes.

    Raises ValueError, which names the method or the limit, for an unknown method, more bytes, and what is not whole.
    """
    known = _METHODS.get(method)
    if known is None:
        raise ValueError(f"{method[:80]!r} cannot be read; send gzip, bzip2, lzma or none")
    decoder = _decoder(known)
    try:
        inflated = decoder.decompress(packed, max_bytes + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise ValueError(f"the body is no {known}") from error
    if len(inflated) > max_bytes:
        raise ValueError(f"the body inflates to more than {max_bytes} bytes")
    if not decoder.eof:
        raise ValueError(f"the body is not whole, its {known} has no end")
    return inflated


def _decoder(method: str) -> _Decoder:
    if method == "bzip2":
        return bz2.BZ2Decompressor()
    if method == "lzma":
        return lzma.LZMADecompressor(memlimit=_LZMA_BYTES)
    return zlib.decompressobj(_ZLIB_OR_GZIP)
