"""The bricks of the formats: chunks, boxes, elements, directories; and where they begin in a file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TIFF_TYPES = {1: 1, 3: 2, 4: 4, 5: 8}
_MASTERS = {b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0", b"\x1f\x43\xb6\x75"}
_CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta"}


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, *extra: bytes, depth: int = 8, colour: int = 2, lace: int = 0) -> bytes:
    """`rows` are already compressed; `extra` chunks come before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, lace)
    return PNG_MAGIC + png_chunk(b"IHDR", header) + b"".join(extra) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], next_at: int = 0, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value or offset)."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", next_at) + tail


def box(kind: bytes, *content: bytes) -> bytes:
    """An ISO media box."""
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def full_box(kind: bytes, *content: bytes) -> bytes:
    """A box with version and flags of 0."""
    return box(kind, bytes(4), *content)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A RIFF chunk."""
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def element(number: bytes, body: bytes, size: bytes | None = None) -> bytes:
    """An EBML element; `size` lies about the length."""
    return number + (size if size is not None else struct.pack(">Q", len(body) | 1 << 56)) + body


def boundaries(content: bytes) -> list[int]:
    """Return where the parts of a file begin, growing, without its very start."""
    if content.startswith(PNG_MAGIC):
        found = list(_chunks(content, 8, ">", 12))
    elif content.startswith(b"\xff\xd8"):
        found = list(_markers(content))
    elif content.startswith(b"RIFF"):
        found = [12, *_chunks(content, 12, "<", 8)]
    elif content.startswith(b"\x1aE\xdf\xa3"):
        found = list(_elements(content, 0, len(content)))
    elif content.startswith((b"II*\x00", b"MM\x00*")):
        found = [4, 8, *_directory(content)]
    elif content[4:8] == b"ftyp":
        found = list(_boxes(content, 0, len(content)))
    else:
        found = [2, 6, 10, 13, 14, 18, 26, 54]
    return sorted({place for place in found if 0 < place < len(content)})


def _chunks(content: bytes, at: int, order: str, overhead: int) -> Iterator[int]:
    """PNG chunks and RIFF chunks; the lists of an AVI too."""
    while at + 8 <= len(content):
        yield at
        length_at = at if overhead == 12 else at + 4
        is_list = overhead == 8 and content[at : at + 4] == b"LIST"
        (length,) = struct.unpack_from(f"{order}I", content, length_at)
        at += 12 if is_list else overhead + length + (length % 2 if overhead == 8 else 0)


def _markers(content: bytes) -> Iterator[int]:
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        yield at
        is_scan = content[at + 1] == 0xDA
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if is_scan:
            yield at


def _directory(content: bytes) -> Iterator[int]:
    order = "<" if content.startswith(b"II") else ">"
    (at,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, at)
    yield from (at, at + 2, *(at + 2 + 12 * entry for entry in range(1, count + 1)))


def _boxes(content: bytes, at: int, end: int) -> Iterator[int]:
    while at + 8 <= end:
        yield at
        length, kind = struct.unpack_from(">I", content, at)[0], content[at + 4 : at + 8]
        if length < 8:
            return
        if kind in _CONTAINERS:
            yield from _boxes(content, at + 8, min(end, at + length))
        at += length


def _elements(content: bytes, at: int, end: int) -> Iterator[int]:
    while at < end:
        yield at
        number_bytes = 9 - content[at].bit_length()
        number = content[at : at + number_bytes]
        at += number_bytes
        if at >= end or content[at] == 0:
            return
        size_bytes = 9 - content[at].bit_length()
        size = int.from_bytes(content[at : at + size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
        at += size_bytes
        if number in _MASTERS:
            yield from _elements(content, at, min(end, at + size))
        at += size
