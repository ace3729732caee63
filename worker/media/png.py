"""PNG (third edition): whether the pixels are all there.

Pillow leaves rows black that the packed data do not bring, when the data end properly, and reads no checksum of them: a
file that was cut may be filled up with zeros, which are codes like others. Here the rows are counted, where that is
in doubt.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

from PIL import Image

_HEAD_BYTES: Final = 8
_NUM_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
#: Adam7's passes: first column, first row, steps to the next ones.
_PASSES: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
#: Bytes unpacked, and packed, at once: what is left of the latter is copied every time.
_PIECE_BYTES: Final = 256 * 1024
_PACKED_BYTES: Final = 16 * 1024


def lacks_pixels(content: bytes, image: Image.Image) -> bool:
    """Tell whether pixels are missing in a PNG that was decoded to `image`; it is unpacked again only in doubt: when
    the last row is as blank as a missing one, rows come in passes, or a checksum is wrong."""
    chunks = list(_chunks(content))
    header = next((body for kind, body, _ in chunks if kind == b"IHDR" and len(body) == 13), None)
    if header is None:
        return False
    is_damaged = any(kind == b"IDAT" and not is_right for kind, _, is_right in chunks)
    is_blank = not any(image.crop((0, image.height - 1, image.width, image.height)).tobytes())
    if not (is_damaged or is_blank or header[12]):
        return False
    num_bytes = _num_bytes(*struct.unpack(">IIBB2xB", header))
    return not _brings((body for kind, body, _ in chunks if kind == b"IDAT"), num_bytes, to_its_end=is_damaged)


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Yield each chunk's kind, content and whether its checksum is right, or cut off."""
    at, view = _HEAD_BYTES, memoryview(content)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        checksum = content[end : end + 4]
        is_right = len(checksum) < 4 or zlib.crc32(view[at + 4 : end]) == int.from_bytes(checksum, "big")
        yield kind, view[at + 8 : end], is_right
        at = end + 4


def _num_bytes(width: int, height: int, bits: int, colour: int, interlace: int) -> int:
    """Return the bytes of all rows, each with its filter's."""
    pixel_bits = bits * _NUM_CHANNELS.get(colour, 1)
    passes = _PASSES if interlace else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * pixel_bits // 8))
    return total


def _brings(chunks: Iterator[memoryview], num_bytes: int, *, to_its_end: bool) -> bool:
    """Whether packed data hold so many bytes; `to_its_end`: and lead to their own, right, checksum."""
    unpacker, found = zlib.decompressobj(), 0
    try:
        for piece in (chunk[at : at + _PACKED_BYTES] for chunk in chunks for at in range(0, len(chunk), _PACKED_BYTES)):
            left: bytes | memoryview = piece
            while left and not unpacker.eof:
                found += len(unpacker.decompress(left, _PIECE_BYTES))
                left = unpacker.unconsumed_tail
                if found >= num_bytes and (not to_its_end or found > num_bytes + _PIECE_BYTES):
                    return not to_its_end
    except zlib.error:
        return False
    return found >= num_bytes and (unpacker.eof or not to_its_end)
