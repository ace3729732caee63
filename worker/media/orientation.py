"""The orientation and pixel aspect with which an image or a clip is shown.

In: EXIF, XMP or a display matrix. Out: one of EXIF's eight orientations, 1 to 8; unreadable metadata give 1, "as
stored". Frames with non-square pixels are scaled in width, as players do, and turned afterwards, as the container's
matrix says.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from PIL import Image

AS_STORED: Final = 1
# EXIF 2.32, tag 0x0112: the operation that makes each orientation upright.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What each does to a point: x' = a·x + c·y, y' = b·x + d·y, y pointing down, as (a, b, c, d).
_MATRICES: Final = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
_EXIF_HEADS: Final = (b"Exif\x00\x00", b"Exif\x00\xff")
_BYTE_ORDERS: Final = {b"II": "<", b"MM": ">"}
_ORIENTATION_TAG: Final = 0x0112
_INTEGERS: Final = {1: "B", 3: "H", 4: "I"}  # TIFF 6.0: BYTE, SHORT, LONG
_XMP: Final = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|\s*>)\s*([1-8])\s*(?:["']|<)""")


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """Return the picture rotated and reflected so that it is upright."""
    transpose = _UPRIGHT.get(orientation)
    return picture if transpose is None else picture.transpose(transpose)


def swaps_sides(orientation: int) -> bool:
    """Whether an orientation swaps width and height."""
    return orientation > 4


def of_exif(block: bytes) -> int | None:
    """Return the orientation in the first directory of an EXIF block, with or without its head; None without one."""
    for head in _EXIF_HEADS:
        block = block.removeprefix(head)
    order = _BYTE_ORDERS.get(block[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", block, directory)
        for at in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, at)
            if tag == _ORIENTATION_TAG and kind in _INTEGERS and count == 1:
                (value,) = struct.unpack_from(f"{order}{_INTEGERS[kind]}", block, at + 8)
                return value if value in _MATRICES else None
    except struct.error:  # an offset or a count beyond the block
        return None
    return None


def of_xmp(packet: bytes) -> int | None:
    """Return the orientation that an XMP packet names; None without one."""
    found = _XMP.search(packet)
    return int(found[1]) if found else None


def of_matrix(a: float, b: float, c: float, d: float) -> int:
    """Return the orientation that comes nearest to a display matrix, whatever its scale (ISO 14496-12, 6.2.2)."""
    given = (a, b, c, d)
    return max(_MATRICES, key=lambda one: sum(x * y for x, y in zip(given, _MATRICES[one], strict=True)))


def of_rotation(degrees_clockwise: float, *, then_mirrored: bool) -> int:
    """Return the orientation of a rotation to the nearest quarter turn, followed by a reflection of left and right."""
    quarter = round(degrees_clockwise / 90) % 4
    a, b, c, d = _MATRICES[(1, 6, 3, 8)[quarter]]
    return of_matrix(-a, b, -c, d) if then_mirrored else of_matrix(a, b, c, d)


@dataclass(frozen=True, slots=True)
class View:
    """How coded frames are shown. orientation: EXIF's number; pixel_aspect: width over height of a coded pixel."""

    orientation: int = AS_STORED
    pixel_aspect: float = 1.0

    def size(self, coded: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of a frame as it is shown; 0 for a side that rounds to nothing."""
        width, height = self._square(coded)
        return (height, width) if swaps_sides(self.orientation) else (width, height)

    def show(self, frame: Image.Image) -> Image.Image:
        """Return a coded frame as it is shown."""
        size = self._square(frame.size)
        square = frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC)
        return upright(square, self.orientation)

    def _square(self, coded: tuple[int, int]) -> tuple[int, int]:
        width, height = coded
        return round(width * self.pixel_aspect), height
